"""`rlboard runs list` and `show`, read as scripts and as people read them."""

from __future__ import annotations

import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from rlboard.cli import main
from rlboard.eventfile import read, scan
from rlboard.runs.find import find_runs
from rlboard.runs.output import age, byte_size
from rlboard.runs.show import sparkline
from rlboard.runs.table import read_run, summary
from rlboard.writer import open_writer
from tests.test_runs_find import ODD_NAMES, make_run

HOUR = 3600


def log(directory: Path, tags: dict[str, list[float]], **facts: Any) -> Path:
    """A run whose curves have a point at every tenth step."""
    directory.mkdir(parents=True)
    with open_writer(directory) as writer:
        for tag, values in tags.items():
            writer.add_scalar_series(tag, 10 * np.arange(1, len(values) + 1), np.array(values))
    if facts:
        said = {"loop": "agents/reinforce", "config": {}, "status": "completed", **facts}
        (directory / "run.json").write_text(json.dumps(said))
    return directory


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Four runs: good and short, newer and worse, of other software, and without a point."""
    root = tmp_path / "logs"
    best = {"best": {"reward": {"value": 90.0, "step": 20}}}
    log(root / "REINFORCE/good", {"train/loss": [3, 2, 1], "reward": [10, 90, 70]}, seed=3, **best)
    log(root / "REINFORCE/worse", {"reward": [1, 2, 3, 4]}, seed=4, status="failed")
    log(root / "other", {"Loss/val": [0.5, math.nan, 0.25, 0.75, math.inf]})
    log(root / "empty", {})
    for hours, name in enumerate(("REINFORCE/worse", "REINFORCE/good", "other", "empty"), start=1):
        for path in (root / name).iterdir():
            os.utime(path, (time.time() - hours * HOUR,) * 2)
    return root


def listed(logs: Path, capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert main(["runs", "list", "--logdir", str(logs), "--json", *options]) == code
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_a_row_says_how_a_run_went(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worse, good, other, empty = listed(logs, capsys)
    modified = good.pop("modified")
    assert 2 * HOUR <= time.time() - modified < 2 * HOUR + 60
    assert good == {
        "run": "REINFORCE/good",
        "status": "completed",
        "seed": 3,
        "steps": 30,
        "metric": "reward",
        "best": 90,
        "last": 70,
        "size": sum(path.stat().st_size for path in (logs / "REINFORCE/good").iterdir()),
        "problem": "",
    }
    assert (worse["status"], worse["best"], worse["last"], worse["steps"]) == ("failed", 4, 4, 40)
    assert (other["status"], other["seed"], other["metric"], other["steps"]) == ("foreign", None, "Loss/val", 50)
    assert (other["best"], other["last"]) == (0.25, None), "of a loss the least is best, and JSON has no infinity"
    assert (empty["steps"], empty["metric"], empty["best"]) == (None, "", None)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--sort=run"], ["REINFORCE/good", "REINFORCE/worse", "empty", "other"]),
        (["--sort=best"], ["REINFORCE/good", "REINFORCE/worse", "other", "empty"]),
        (["--sort=best", "--reverse"], ["other", "REINFORCE/worse", "REINFORCE/good", "empty"]),
        (["--sort=steps", "--limit=2"], ["other", "REINFORCE/worse"]),
        (["--reverse", "--limit=1"], ["empty"]),
        (["--filter=REINF"], ["REINFORCE/worse", "REINFORCE/good"]),
        (["--filter=*o*", "--status=foreign"], ["other"]),
        (["--status=failed", "--status=completed"], ["REINFORCE/worse", "REINFORCE/good"]),
        (["--filter=nothing"], []),
    ],
)
def test_sorted_and_filtered(
    options: list[str], names: list[str], logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [row["run"] for row in listed(logs, capsys, *options)] == names


def test_in_a_pipe_columns_are_separated_by_tabs(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list", "--logdir", str(logs), "--sort=run"]) == 0
    header, good, *rest = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert header == ["run", "status", "age", "seed", "steps", "metric", "best", "last", "size"]
    assert good[:-1] == ["REINFORCE/good", "completed", "2 h", "3", "30", "reward", "90", "70"]
    assert all(len(row) == len(header) for row in rest)


def test_on_a_terminal_a_table_fits(
    logs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["runs", "list", "--logdir", str(logs), "--limit", "3"]) == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["run", "status", "age", "steps", "best", "last"]
    assert lines[2].split() == ["REINFORCE/good", "completed", "2", "h", "30", "90", "70"]
    assert lines[-1] == "and 1 more: --limit 0 shows all"


def test_a_damaged_run_is_said_and_the_others_are_listed(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (event_file,) = (logs / "other").iterdir()
    content = bytearray(event_file.read_bytes())
    content[-20] ^= 1
    event_file.write_bytes(content)
    (logs / "REINFORCE/good/run.json").write_text("[]")
    assert main(["runs", "list", "--logdir", str(logs), "--json"]) == 3
    output = capsys.readouterr()
    rows = {row["run"]: row for row in json.loads(output.out)}
    assert "rlboard runs repair" in rows["other"]["problem"]
    assert "run.json is damaged" in rows["REINFORCE/good"]["problem"]
    assert rows["REINFORCE/good"]["best"] == 90, "its event file is whole"
    assert len(rows) == 4
    assert output.err.count("\n") == 1


def test_an_event_file_that_cannot_be_read(
    logs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (event_file,) = (logs / "other").iterdir()
    opened = Path.open

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == event_file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    rows = {row["run"]: row for row in listed(logs, capsys, code=3)}
    assert rows["other"]["status"] == "unreadable"
    assert rows["other"]["problem"].endswith("cannot be read: Permission denied")
    assert rows["REINFORCE/good"]["best"] == 90


@pytest.mark.parametrize("command", ["list", "show"])
def test_odd_names_stay_in_their_row(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ODD_NAMES:
        make_run(tmp_path / name)
    arguments = ["runs", command, "--logdir", str(tmp_path), *(["*"] if command == "show" else [])]
    assert main(arguments) == 0
    plain = capsys.readouterr().out
    assert "line\\nbreak" in plain
    assert "\x1b" not in plain
    if command == "list":
        assert len(plain.splitlines()) == len(ODD_NAMES) + 1
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(arguments) == 0
    assert ",:=%#?&'\"[]" in capsys.readouterr().out, "brackets are not taken for markup"


@pytest.mark.parametrize("command", ["list", "show", "compare", "export", "repair"])
def test_a_log_directory_that_is_missing_or_a_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for name, words in (("missing", "is not there"), ("file", "is a file")):
        runs = ["any"] if command == "compare" else []
        assert main(["runs", command, *runs, "--logdir", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err


def test_an_empty_log_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(tmp_path, capsys) == []
    assert main(["runs", "show", "--logdir", str(tmp_path)]) == 2
    assert "there are no runs" in capsys.readouterr().err


def test_show_tells_everything_of_a_run(smoke_log_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "show", "--logdir", str(smoke_log_dir)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["status", "completed"] in lines
    assert ["episodes", "60", "10000"] in lines, "value and default of what is not the default"
    assert ["hidden_size", "128"] in lines
    (reward,) = (line for line in lines if line[:2] == ["reward", "3"])
    assert len(reward[-1]) == 3
    assert any(line[:1] == ["checkpoint.pt"] for line in lines)


@pytest.mark.parametrize("arguments", [["list"], ["show", "good"]])
def test_json_tells_a_killed_run_from_a_running_one(
    arguments: list[str], logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = logs / "REINFORCE/good/run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "running"}))
    assert main(["runs", *arguments, "--logdir", str(logs), "--json"]) == 0
    (good,) = (run for run in json.loads(capsys.readouterr().out) if run["run"] == "REINFORCE/good")
    assert good["status"] == "killed"


def test_show_as_json_names_what_is_missing_and_shows_the_rest(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "show", "--logdir", str(logs), "--json", "good", "nowhere", "other"]) == 2
    output = capsys.readouterr()
    good, other = json.loads(output.out)
    assert good["metrics"]["reward"] == {
        "points": 3,
        "last_step": 30,
        "last": 70,
        "best": 90,
        "best_step": 20,
        "smaller_is_better": False,
    }
    assert other["metrics"]["Loss/val"]["best_step"] == 30
    assert output.err == "rlboard: RUN nowhere is not there: did you mean other?\n"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([5, 5, 5], "▁▁▁"),
        ([math.nan, 1, math.inf, 2], " ▁ █"),
        ([math.nan], ""),
        (list(range(1000)), "▁▁▁▂▂▂▃▃▃▄▄▄▅▅▅▆▆▆▇▇▇███"),
    ],
)
def test_a_curve_as_a_line_of_blocks(values: list[float], line: str) -> None:
    drawn = sparkline(np.array(values, np.float32))
    assert drawn == line or (len(values) == 1000 and sorted(drawn) == list(drawn) and len(drawn) == 24)


def test_ages_and_sizes() -> None:
    assert [age(-past, 0) for past in (5, 90, 3 * HOUR, 40 * 24 * HOUR, -5)] == ["5 s", "2 min", "3 h", "40 d", "0 s"]
    assert [byte_size(count) for count in (0, 812, 4200, 123_456, 1.3e9, 2e12)] == [
        "0 B", "812 B", "4.2 kB", "123 kB", "1.3 GB", "2.0 TB",
    ]  # fmt: skip


def test_many_small_files_are_read_in_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_plain_bytes", 0)
    monkeypatch.setattr(read, "COMPILE_BYTES", 300)
    for number in range(5):
        make_run(tmp_path / str(number))
    with mock.patch.object(scan, "compiled", return_value=scan.PLAIN) as compiled:
        compiled.cache_info.return_value.currsize = 0
        for run in find_runs(tmp_path):
            assert run.size < 100
            assert summary(run, *read_run(run)).last == 2
    assert compiled.called
