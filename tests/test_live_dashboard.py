"""`rlboard dashboard` while runs are written: a real process, asked over HTTP and looked at in headless Chromium."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, Request, build_opener, urlopen

import numpy as np
import pytest

from rlboard.writer import open_writer
from tests.browser import Dashboard, chromium, dashboard, eventually, get, tensorboard
from tests.test_dashboard_guard import OUTSIDE, configure

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.xdist_group("live_dashboard")

ODD_NAMES = ("한국어 실행", "sp ace", "emoji🎉", "a,b:c=d%e#f?g&h", "q'\"uote[1]", "new\nline", "~", "<b>x</b>")
SETTINGS = "JSON.parse(localStorage.getItem('_tb_global_settings'))"
Y_RANGE = """() => {
  const find = (root) => [...root.querySelectorAll('*')].map((node) =>
    node.localName === 'tf-line-chart-data-loader' ? node : node.shadowRoot && find(node.shadowRoot)).find(Boolean);
  return find(document)?.getChart()._chart?.yScale.domain();
}"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live") / "로그 logs"


@pytest.fixture(scope="module")
def live(logs: Path) -> Iterator[Dashboard]:
    """A dashboard of a log directory that nobody has made yet."""
    options = ("--port", "0", "--reload", "1", "--dark", "--smoothing", "0.8")
    with dashboard(logs, logs.parent / "errors", *options) as running:
        yield running


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as page:
        yield page


def status(address: str, **headers: str) -> int:
    try:
        with urlopen(Request(address, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def runs(url: str) -> set[str]:
    return set(get(url, "runs"))


def write_odd_runs(logs: Path) -> set[str]:
    for name in ODD_NAMES:
        with open_writer(logs / "odd" / name) as writer:
            writer.add_scalar("odd", 1.0, 3)
    return {f"odd/{name}" for name in ODD_NAMES}


def steps_on_the_page(url: str, run: str, tag: str) -> list[int]:
    """What the Time Series page is sent for its chart of `tag`."""
    request = urlencode({"requests": json.dumps([{"plugin": "scalars", "tag": tag}])}).encode()
    with urlopen(f"{url}/data/plugin/timeseries/timeSeries", request, timeout=30) as answer:
        (series,) = json.loads(answer.read())
    return [point["step"] for point in series.get("runToSeries", {}).get(run, [])]


@pytest.mark.browser
def test_the_newest_step_appears_and_nobody_clicks(live: Dashboard, logs: Path, page: Page) -> None:
    assert live.errors.read_text().endswith(
        f"{logs.name} is not there yet: runs that start later appear by themselves\n"
    )
    page.goto(live.url)
    page.get_by_text("No dashboards are active").wait_for()
    with open_writer(logs / "REINFORCE" / "run") as writer:
        writer.add_text("Hyperparameters", "lr 1e-3")
        writer.flush()
        page.wait_for_url("**#text")  # the first tab with content
        writer.add_scalar("reward", 1.0, 0)
        writer.flush()
        page.wait_for_url("**#timeseries")  # then the curves
        for step in (100, 200):
            writer.add_scalar("reward", step, step)
            writer.flush()
            # TensorBoard by itself would look again after 30 seconds.
            page.locator("metrics-pinned-view scalar-card card-fob", has_text=str(step)).wait_for(timeout=25_000)
    assert page.evaluate("document.body.classList.contains('dark-mode')")
    assert page.locator("metrics-dashboard-settings-component input[type=number]").first.input_value() == "0.8"


@pytest.mark.slow
@pytest.mark.browser
def test_the_gear_menu_shows_the_period_and_what_the_user_chooses_stays(live: Dashboard, page: Page) -> None:
    period = page.locator("settings-dialog input.reload-period")

    def open_gear(expected: str) -> None:
        page.click("app-header settings-button button")
        period.wait_for()
        assert page.locator("settings-dialog input[type=checkbox]").is_checked()
        assert period.input_value() == expected

    if not page.url.startswith(live.url):
        page.goto(live.url)
    open_gear("1")
    period.fill("45")
    page.wait_for_function(f"{SETTINGS}.autoReloadPeriodInMs === 45000")
    page.reload()
    open_gear("45")
    page.evaluate("localStorage.setItem('rlboard.preset', 'what another command line asked for')")
    page.reload()
    open_gear("1")


def test_every_point_and_image_is_there(live: Dashboard, logs: Path) -> None:
    with open_writer(logs / "long") as writer:
        writer.add_scalar_series("episode/reward", np.arange(10_000), np.arange(10_000.0))
        for step in range(50):
            writer.add_image("sample", np.full((1, 2, 2), step, np.uint8), step)
    eventually(lambda: steps_on_the_page(live.url, "long", "episode/reward")[-1:] == [9_999])
    assert steps_on_the_page(live.url, "long", "episode/reward") == list(range(10_000))
    assert len(get(live.url, "plugin/scalars/scalars", run="long", tag="episode/reward")) == 10_000
    images = get(live.url, "plugin/images/images", run="long", tag="sample", sample=0)
    assert [image["step"] for image in images] == list(range(50))


def test_odd_names_are_shown(live: Dashboard, logs: Path) -> None:
    expected = write_odd_runs(logs)
    eventually(lambda: expected <= runs(live.url))
    for run in expected:
        assert steps_on_the_page(live.url, run, "odd") == [3]


def test_strangers_and_paths_outside_are_refused(live: Dashboard, logs: Path) -> None:
    assert status(f"{live.url}/data/runs") == 200
    assert status(f"{live.url}/data/runs", Host="evil.example") == 403
    with open_writer(logs / "projected") as writer:
        writer.add_scalar("x", 1.0, 0)
    eventually(lambda: "projected" in runs(live.url))
    configure(logs / "projected", OUTSIDE[0])
    assert status(f"{live.url}/data/plugin/projector/tensor?run=projected&name=passwd") == 403


def test_a_busy_port_the_newest_run_a_token_and_ctrl_c(live: Dashboard, tmp_path: Path) -> None:
    busy = live.url.rpartition(":")[2]
    logs, temporary = tmp_path / "logs", tmp_path / "temporary"
    temporary.mkdir()
    for age, name in enumerate(("G/new", "G/old", "other/run")):
        with open_writer(logs / name) as writer:
            writer.add_scalar("reward", 1.0, 1)
        for file in (logs / name).iterdir():
            os.utime(file, (1e9 - age, 1e9 - age))
    options = ("--host", "0.0.0.0", "--expose", "--port", busy, "--reload", "1", "--last", "1", "--filter", "G/*")
    with dashboard(logs, tmp_path / "errors", *options, TMPDIR=str(temporary)) as exposed:
        address, _, token = exposed.url.partition("/?token=")
        port = address.rpartition(":")[2]
        url = f"http://127.0.0.1:{port}"
        assert port != busy
        assert len(token) >= 32
        assert status(f"{url}/data/runs") == 401
        assert status(f"{url}/data/runs", Authorization=f"Bearer {token}", Host="evil.example") == 403
        browser = build_opener(HTTPCookieProcessor(CookieJar()))
        with browser.open(f"{url}/?token={token}", timeout=30) as page:
            assert page.url == f"{url}/"

        def shown() -> list[str]:
            with browser.open(f"{url}/data/runs", timeout=30) as answer:
                return list(json.loads(answer.read()))

        eventually(lambda: shown() == ["G/new"])
        with open_writer(logs / "G" / "newer") as writer:
            writer.add_scalar("reward", 1.0, 1)
        eventually(lambda: shown() == ["G/newer"])
        (links,) = temporary.glob("rlboard-dashboard-*")

        assert exposed.interrupt() == 128 + signal.SIGINT
        first, *others = exposed.errors.read_text().splitlines()
        assert first == f"rlboard: port {busy} is busy, took {port}"
        assert len(others) == 2
        assert f"ssh -L {port}:localhost:{port}" in others[1]
        assert not any(token in line for line in others)
    assert not links.exists()
    assert {path.name for path in (logs / "G").iterdir()} == {"new", "old", "newer"}
    eventually(lambda: not any(str(links) in command for command in commands()))


def commands() -> Iterator[str]:
    """The command lines of all processes, where the system tells them as files."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            yield (process / "cmdline").read_bytes().decode(errors="replace")


@pytest.mark.slow
def test_tensorboard_alone_shows_the_same(live: Dashboard, logs: Path) -> None:
    expected = write_odd_runs(logs)
    with tensorboard(logs) as url:
        assert expected <= runs(url)
        eventually(lambda: runs(live.url) == runs(url))


@pytest.mark.slow
@pytest.mark.browser
def test_the_y_axis_follows_unless_the_user_has_zoomed(live: Dashboard, logs: Path, page: Page) -> None:
    def range_of_y() -> Any:
        return page.evaluate(Y_RANGE)

    def reaches(value: float) -> Callable[[], bool]:
        return lambda: range_of_y()[1] > value

    with open_writer(logs / "axis") as writer:

        def log(value: float) -> None:
            writer.add_scalar("axis", value, int(value))
            writer.flush()

        log(1.0)
        log(2.0)
        writer.add_custom_scalars({"axis": {"axis": ("Multiline", ["^axis$"])}})
        writer.flush()
        eventually(lambda: get(live.url, "plugins_listing")["custom_scalars"]["enabled"])
        for tab, value in (("scalars&tagFilter=axis", 10.0), ("custom_scalars", 1000.0)):
            page.goto("about:blank")
            page.goto(f"{live.url}/#{tab}")
            eventually(range_of_y)
            log(value)
            log(value + 1)
            eventually(reaches(value / 4))
            box = page.locator("vz-line-chart2").first.bounding_box()
            assert box
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y - 40)
            page.mouse.down()
            page.mouse.move(x + 40, y + 20, steps=4)
            page.mouse.up()
            page.wait_for_timeout(1000)  # the zoom is animated
            zoomed = range_of_y()
            log(value * 5)
            log(value * 5 + 1)
            page.wait_for_timeout(4000)
            assert range_of_y() == zoomed
            page.mouse.dblclick(x, y)
            eventually(reaches(value * 5 / 4))
        assert page.locator("tf-smoothing-input").first.evaluate("(node) => node.weight") == 0.8


@pytest.mark.slow
@pytest.mark.browser
def test_the_button_is_pressed_where_the_period_cannot_be_lowered(tmp_path: Path, page: Page) -> None:
    before = "import rlboard.dashboard.assets as assets; assets.FLOORS = (('not in there', ''),)"
    with (
        dashboard(tmp_path / "logs", tmp_path / "errors", "--port", "0", "--reload", "1", before=before) as running,
        open_writer(tmp_path / "logs" / "run") as writer,
    ):
        page.goto(running.url)
        for step in (0, 100, 200):
            writer.add_scalar("reward", step, step)
            writer.flush()
            page.locator("metrics-pinned-view scalar-card card-fob", has_text=str(step)).wait_for(timeout=25_000)
        assert page.evaluate(f"{SETTINGS}.autoReloadPeriodInMs") == 30_001


@pytest.mark.slow  # it holds a time, which a busy machine may miss
@pytest.mark.browser
def test_a_point_is_on_the_page_within_two_periods(tmp_path: Path, page: Page) -> None:
    with open_writer(tmp_path / "logs/run") as writer:
        writer.add_scalar("reward", 0.0, 0)
        writer.flush()
        with dashboard(tmp_path / "logs", tmp_path / "errors", "--port", "0") as running:
            page.goto(f"{running.url}/#timeseries")
            page.locator("metrics-pinned-view scalar-card").wait_for()
            for step in (100, 200, 300):
                writer.add_scalar("reward", step, step)
                writer.flush()
                newest = page.locator("metrics-pinned-view scalar-card card-fob", has_text=str(step))
                newest.wait_for(timeout=2 * 5_000)  # milliseconds; nobody has asked for another period
