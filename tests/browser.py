"""What tests of the dashboard share: a TensorBoard of their own, and a headless Chromium that looks at it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import FrameLocator, Page

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--headless=new",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

TABS: dict[str, tuple[str, str]] = {
    "Time Series": ("timeseries", "scalar-card line-chart, image-card img"),
    "Scalars": ("scalars", "tf-scalar-card"),
    "Custom Scalars": ("custom_scalars", "tf-custom-scalar-multi-line-chart-card"),
    "Images": ("images", "tf-image-loader img"),
    "Audio": ("audio", "tf-audio-loader audio"),
    "Text": ("text", "tf-text-loader tf-markdown-view"),
    "Graphs": ("graphs", "g.node"),
    "Distributions": ("distributions", "vz-distribution-chart path"),
    "Histograms": ("histograms", "vz-histogram-timeseries svg path"),
    "PR Curves": ("pr_curves", "tf-pr-curve-card"),
    "Mesh": ("mesh", "tf-mesh-loader canvas"),
    "Projector": ("projector", "iframe iframe vz-projector >> text=/Points: [1-9]/"),
    "HParams": ("hparams", "tf-hparams-session-group-values"),
    "Profile": ("rlboard_profile", "iframe .step .number"),
}
"""Of each tab: its name in the address, and what is there when it has something to show, in frames one in another."""


@contextlib.contextmanager
def tensorboard(logdir: Path, *options: str) -> Iterator[str]:
    """Yields the address, without a slash at its end, of a TensorBoard that has loaded all of `logdir`."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port=0", "--host=127.0.0.1"),
            *("--load_fast=false", "--reload_interval=0", "--reload_task=blocking"),  # serves when all is loaded
            *options,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        output = ""
        while not (address := re.search(r"at (http://\S+)/ \(Press", output)):
            line = process.stderr.readline()
            assert line, f"TensorBoard ended before it served:\n{output}"
            output += line
        yield address[1]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@dataclass
class Dashboard:
    """A running `rlboard dashboard`: its process, its address without a slash at its end, and where its errors go."""

    process: subprocess.Popen[str]
    url: str
    errors: Path

    def interrupt(self) -> int:
        """Ends it as Ctrl-C in a terminal does; returns its exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(timeout=30)


@contextlib.contextmanager
def dashboard(logdir: Path, errors: Path, *options: str, before: str = "", **environment: str) -> Iterator[Dashboard]:
    """Runs `rlboard dashboard` on `logdir`, its standard error in the file `errors`, after the Python code `before`."""
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's `&` has it ignored
    code = f"{heard}\n{before}\nfrom rlboard.cli import main\nraise SystemExit(main())"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "dashboard", "--logdir", str(logdir), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,  # so that Ctrl-C can be sent to it and what it has started, and to nobody else
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        address = re.fullmatch(r"dashboard: (http://\S+) \(Ctrl-C ends it\)\n", line)
        assert address, f"{line}{errors.read_text()}"
        yield Dashboard(process, address[1].rstrip("/"), errors)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)


def eventually(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What `condition` returns once it is true; the test fails where it is not true in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"still {value!r}"
        time.sleep(0.1)
    return value


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """Yields an empty page of the system's Chromium; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    executable = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if executable is None:
        pytest.skip(f"needs a browser: none of {', '.join(CHROMIUM_NAMES)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=CHROMIUM_ARGUMENTS)
        try:
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.set_default_timeout(60_000)  # milliseconds; a busy machine draws slowly
            yield page
        finally:
            browser.close()


def open_tab(page: Page, url: str, name: str, **query: str) -> None:
    """Loads a tab of the TensorBoard at `url` anew, and waits until it shows something."""
    tab, selector = TABS[name]
    page.goto(f"{url}/?{urlencode({'tab': tab, **query})}#{tab}")  # another query is another page, loaded anew
    *frames, selector = selector.split("iframe ")
    place: Page | FrameLocator = page
    for _ in frames:
        place = place.frame_locator("iframe")
    found = place.locator(selector).first
    found.wait_for(state="attached")
    if name == "Images":
        found.wait_for(state="visible")
        assert found.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def get(url: str, path: str, body: Any = None, **query: Any) -> Any:
    """What the TensorBoard at `url` answers to a request for data: decoded if it is JSON, else as bytes."""
    address = f"{url}/data/{path}"
    if query:
        address += f"?{urlencode(query)}"
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(address, data=data, headers={"Content-Type": "application/json"}), timeout=30) as answer:
        content = answer.read()
    return json.loads(content) if answer.headers["Content-Type"].startswith("application/json") else content
