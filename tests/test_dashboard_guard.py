"""What `rlboard dashboard` refuses, chooses and changes, without a server: the guard, the selection, the page."""

from __future__ import annotations

import io
import json
import os
import re
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from werkzeug import Response
from werkzeug.test import Client

from rlboard.cli import main
from rlboard.dashboard import assets, guard, server
from rlboard.dashboard.guard import Guard
from rlboard.dashboard.selection import Selection, choose
from rlboard.runs.find import LoggedRun
from rlboard.writer import open_writer

ODD_NAMES = [
    "한국어 실행",
    "sp ace",
    "emoji🎉",
    "a,b:c=d%e#f?g&h",
    "q'\"uote[1]",
    "new\nline",
    "~",
    "back\\slash",
    "*?",
]

Log = Callable[..., Path]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Writes a run of that name with one point, as if it had last been written at `modified`; returns its directory."""

    def write(name: str, modified: float = 1e9) -> Path:
        directory = tmp_path / "logs" / name
        with open_writer(directory) as writer:
            writer.add_scalar("reward", 1.0, 7)
        for file in directory.iterdir():
            os.utime(file, (modified, modified))
        return directory

    return write


def guarded(root: Path, token: str = "", logdir: Path | None = None) -> Client:
    app = Response("the page")
    hosts = guard.allowed_hosts("127.0.0.1", ["Proxy.Example"], exposed=bool(token))
    return Client(Guard(app, logdir=logdir or root, root=root, hosts=hosts, token=token))


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:6006", "localhost.", "127.0.0.1:80", "[::1]", "[::1]:6006", "proxy.example:8443"]
)
def test_known_hosts_are_answered(tmp_path: Path, host: str) -> None:
    assert guarded(tmp_path).get("/", headers={"Host": host}).text == "the page"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil@localhost",
        "localhost/x",
        "",
        "[::2]",
        "127.0.0.2",
        "localhost,x",
    ],
)
def test_unknown_hosts_are_not(tmp_path: Path, host: str) -> None:
    assert guarded(tmp_path).get("/", headers={"Host": host}).status_code == 403


def test_an_exposed_machine_is_known_by_its_own_names(tmp_path: Path) -> None:
    client = guarded(tmp_path, "secret")
    for name in guard.machine_names():
        host = f"[{name}]" if ":" in name else name
        assert client.get("/", headers={"Host": f"{host}:6006", "Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/", headers={"Host": "evil.example", "Authorization": "Bearer secret"}).status_code == 403


def test_the_token_becomes_a_cookie_that_no_script_reads(tmp_path: Path) -> None:
    client = guarded(tmp_path, "secret")
    assert client.get("/").status_code == 401
    answer = client.get("/?token=secret&darkMode=true&x=%26")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/?darkMode=true&x=%26")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(answer.headers["Set-Cookie"].split("; "))
    assert client.get("/").text == "the page"
    assert guarded(tmp_path, "secret").get("/").status_code == 401


@pytest.mark.parametrize("path", ["//evil.example/?token=secret", "/data/runs?token=secret"])
def test_the_way_on_never_leads_to_another_host(tmp_path: Path, path: str) -> None:
    assert guarded(tmp_path, "secret").get(path, base_url="http://localhost").headers["Location"] == "/"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer secre"},
        {"Authorization": "Bearer secret2"},
        {"Authorization": "Bearer 비밀".encode().decode("latin-1")},
        {"Authorization": "Basic c2VjcmV0OnNlY3JldA=="},
        {"Authorization": "secret"},
        {"Cookie": "rlboard-token-80=wrong"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/index.js", "/data/runs", "/?token=", "/?token=wrong", "/data/plugin/x?run=a"])
def test_nothing_is_served_without_the_token(tmp_path: Path, path: str, headers: dict[str, str]) -> None:
    answer = guarded(tmp_path, "secret").post(path, headers=headers)
    assert answer.status_code == 401
    assert "secret" not in answer.text


def test_where_tensorboard_fails_there_is_one_line(tmp_path: Path) -> None:
    def failing(*_: object) -> list[bytes]:
        raise ValueError("shape\n(2, 3)")

    client = Client(Guard(failing, logdir=tmp_path, root=tmp_path, hosts=["localhost"]))
    with pytest.warns(UserWarning, match=r"^TensorBoard cannot answer /a: ValueError: shape\\n\(2, 3\)$"):
        assert client.get("/a").status_code == 500


def configure(run: Path, text: str, folder: str = "") -> None:
    (run / folder).mkdir(parents=True, exist_ok=True)
    (run / folder / "projector_config.pbtxt").write_text(text)


OUTSIDE = [
    'embeddings { tensor_path: "/etc/passwd" }',
    'embeddings { tensor_path: "../../../../../outside" }',
    'embeddings { tensor_path: "fine.tsv" } embeddings { metadata_path: "~/.ssh/id_rsa" }',
    'embeddings { bookmarks_path: "link/secret" }',
    'embeddings { sprite { image_path: "a/../../../../../x.png" } }',
    'embeddings { tensor_path: "a\\000b" }',
    'model_checkpoint_path: "/var/lib/model"',
]


@pytest.mark.parametrize("config", OUTSIDE)
@pytest.mark.parametrize("folder", ["", "plugins/org_tensorflow_tensorboard_projector"])
def test_a_projector_that_points_outside_is_refused(tmp_path: Path, log: Log, config: str, folder: str) -> None:
    run, root = log("run"), tmp_path / "logs"
    (run / "link").symlink_to(tmp_path)
    (run / folder / "link").parent.mkdir(parents=True, exist_ok=True)
    if folder:
        (run / folder / "link").symlink_to(tmp_path)
    configure(run, config, folder)
    client = guarded(root)
    for path in ("/data/plugin/projector/tensor", "/experiment/e/data/plugin/projector/info/"):
        answer = client.get(path, query_string={"run": "run"})
        assert answer.status_code == 403
        assert "projector_config.pbtxt names" in answer.text
    assert client.get("/data/plugin/projector/runs").status_code == 200
    assert client.get("/data/plugin/scalars/tags?run=run").status_code == 200


def test_the_start_is_refused_in_one_line(tmp_path: Path, log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    run = log("REINFORCE/run")
    configure(run, OUTSIDE[0])
    assert main(["dashboard", "--logdir", str(tmp_path / "logs")]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{run / 'projector_config.pbtxt'} names /etc/passwd, which is outside" in error


@pytest.mark.parametrize(
    "config",
    [
        'embeddings { tensor_path: "00000/default/tensors.bytes" metadata_path: "../shared.tsv" }',
        "embeddings { tensor_name: 'a checkpoint' }",
        "broken {",
        "",
    ],
)
def test_a_projector_that_stays_inside_is_served(tmp_path: Path, log: Log, config: str) -> None:
    run = log("run")
    configure(run, config)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "run").symlink_to(run)  # as --last and --filter show it
    for logdir in (tmp_path / "logs", tmp_path / "links"):
        client = guarded(tmp_path / "logs", logdir=logdir)
        assert client.get("/data/plugin/projector/info?run=run").status_code == 200


def runs(**modified: float) -> list[LoggedRun]:
    return [LoggedRun(name, Path("/logs", name), modified=time) for name, time in modified.items()]


def test_the_newest_runs_are_chosen_and_a_group_is_one() -> None:
    found = [
        LoggedRun("group", Path("/logs/group"), modified=1),
        LoggedRun("group/seed1", Path("/logs/group/seed1"), modified=9),
        *runs(old=2, new=8, newer=8.5),
        LoggedRun("locked", Path("/logs/locked"), modified=99, problem="cannot be read"),
    ]
    assert list(choose(found, "", 2)) == ["group", "newer"]
    assert choose(found, "seed", None) == {"group/seed1": Path("/logs/group/seed1")}
    assert set(choose(found, "", None)) == {"group", "old", "new", "newer"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=1", {"a/lr=1", "a/lr=10", "b[lr=1]"}),
        ("*lr=1", {"a/lr=1"}),
        ("lr=1?", {"a/lr=10"}),
        ("b[lr=?]", {"b[lr=1]"}),
        ("한글", {unicodedata.normalize("NFD", "한글")}),  # macOS takes letters apart
        ("nothing", set()),
    ],
)
def test_a_filter_is_a_part_or_a_pattern(text: str, expected: set[str]) -> None:
    names = ("a/lr=1", "a/lr=10", "b[lr=1]", unicodedata.normalize("NFD", "한글"), ".")
    found = [LoggedRun(name, Path("/logs", name)) for name in names]
    assert set(choose(found, text, None)) == expected


def test_links_follow_the_newest_runs_and_the_python_loader_follows_them(tmp_path: Path, log: Log) -> None:
    links = tmp_path / "links"
    links.mkdir()
    selection = Selection(tmp_path / "logs", links, "", len(ODD_NAMES))
    selection.refresh()  # there is no log directory yet
    assert list(links.iterdir()) == []

    def loaded() -> dict[str, list[int]]:
        multiplexer = EventMultiplexer()
        multiplexer.AddRunsFromDirectory(str(links))
        multiplexer.Reload()
        return {name: [event.step for event in multiplexer.Tensors(name, "reward")] for name in multiplexer.Runs()}

    for time, name in enumerate(ODD_NAMES):
        log(f"G/{name}", time)
    selection.refresh()
    assert loaded() == {f"G/{name}": [7] for name in ODD_NAMES}

    for time, name in enumerate(ODD_NAMES):
        log(f"later/{name}", 100 + time)
    selection.refresh()
    assert loaded() == {f"later/{name}": [7] for name in ODD_NAMES}
    assert [path.name for path in links.iterdir()] == ["later"]
    assert len(list((tmp_path / "logs" / "G").iterdir())) == len(ODD_NAMES)  # only links are ever removed


def test_a_run_around_chosen_ones_takes_their_place(tmp_path: Path, log: Log) -> None:
    links = tmp_path / "links"
    links.mkdir()
    selection = Selection(tmp_path / "logs", links, "", 5)
    log("G/seed1")
    selection.refresh()
    assert (links / "G" / "seed1").is_symlink()
    log("G")
    log("")
    selection.refresh()
    assert (links / "G").is_symlink()
    assert any(path.name.startswith("events") for path in links.iterdir())  # the root's own


def preset_of(page: assets.ZipProvider) -> tuple[dict[str, object], zipfile.ZipFile]:
    archive = zipfile.ZipFile(page())
    found = re.match(r"\{\nconst preset = (.*);\n", archive.read(assets.SCRIPT).decode())
    assert found
    return json.loads(found[1]), archive


def test_this_tensorboard_takes_short_periods() -> None:
    """Where it no longer does, the button is pressed instead, and `FLOORS` can be mended."""
    preset, archive = preset_of(assets.preset_page(server.stock_assets(), reload=2, smoothing=0.9, dark=False))
    assert preset["settings"] == {
        "autoReload": True,
        "autoReloadPeriodInMs": 2000,
        "scalarSmoothing": 0.9,
        "theme": "light",
    }
    assert not preset["press"]
    script, index = archive.read("index.js").decode(), archive.read("index.html").decode()
    assert "MIN_RELOAD_PERIOD_IN_S=1," in script
    assert script.count(assets.SMOOTHING.format("0.9")) > 0
    assert index.index(assets.SCRIPT) < index.index("index.js?_file_hash=")
    with server.stock_assets()() as file, zipfile.ZipFile(file) as stock:
        assert set(archive.namelist()) == {assets.SCRIPT, *stock.namelist()}
        assert stock.read("index.js").decode() != script


def page_with(script: str) -> assets.ZipProvider:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("index.js", script)
        archive.writestr("index.html", '<body><script src="index.js"></script></body>')
    return lambda: io.BytesIO(content.getvalue())


def test_another_tensorboard_is_left_as_it_is_and_its_button_pressed() -> None:
    one_twice = "".join(old for old, _ in assets.FLOORS) + assets.FLOORS[0][0]
    preset, archive = preset_of(assets.preset_page(page_with(one_twice), reload=5, smoothing=0.6))
    assert preset["press"]
    assert preset["settings"] == {"autoReload": True, "autoReloadPeriodInMs": 30001, "scalarSmoothing": 0.6}
    assert b">3e4" in archive.read("index.js")
    assert archive.read("index.html").decode().count("<script") == 2


def test_equal_presets_are_one_and_others_are_not() -> None:
    def identity(**options: object) -> object:
        arguments = {"reload": 5, "smoothing": 0.6, "dark": None} | options
        return preset_of(assets.preset_page(page_with(""), **arguments))[0]["id"]  # type: ignore[arg-type]

    assert identity() == identity()
    assert len({identity(), identity(reload=6), identity(smoothing=0.7), identity(dark=True)}) == 4


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--reload", "0"], 2, "--reload"),
        (["--reload", "0.5"], 2, "--reload"),
        (["--reload", "-1"], 2, "--reload"),
        (["--reload", "nan"], 2, "--reload"),
        (["--reload", "1e99"], 2, "--reload"),
        (["--reload", "9" * 30], 2, "--reload"),
        (["--port", "65536"], 2, "--port"),
        (["--port", "-1"], 2, "--port"),
        (["--last", "0"], 2, "--last"),
        (["--smoothing", "nan"], 2, "--smoothing"),
        (["--smoothing", "1"], 2, "--smoothing"),
        (["--host", "0.0.0.0"], 2, "ssh -L 6006:localhost:6006"),
        (["--host", "::"], 2, "--expose"),
        (["--host", "localhost.example"], 2, "--expose"),
        (["--host", ""], 2, "empty"),
        (["--expose"], 2, "--host 0.0.0.0"),
        (["--expose", "--host", "127.0.0.1"], 2, "--host 0.0.0.0"),
        (["--expose", "--host", "0.0.0.0", "--open"], 2, "--open"),
        (["--expose", "--host", "no such host"], 2, "no address of this machine"),
        (["--logdir", "a file"], 2, "is a file"),
        (["--logdir", "a file/logs"], 2, "is a file"),
        (["--logdir", "x" * 5000], 5, "cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "a file").touch()
    (tmp_path / "logs" / "run").mkdir()
    (tmp_path / "logs" / "run" / "events.out.tfevents.1").touch()
    assert main(["dashboard", *options]) == code
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert words in output.err
    assert not output.out
