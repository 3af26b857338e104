"""The command line as a user meets it: a mistake is one line, and the exit code says of which kind it is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlboard import __version__
from rlboard.cli import build_app, main
from rlboard.registry import TRACKS, Loop, Track
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("few_shapes")

MISTAKES = {
    ("--episodes", "0"): 2,
    ("--episodes", "-5"): 2,
    ("--episodes", "1e4"): 2,
    ("--episodes", "abc"): 2,
    ("--episodes", ""): 2,
    ("--learning-rate", "nan"): 2,
    ("--lr", "-1"): 2,
    ("--gamma", "1.5"): 2,
    ("--env-id", "CartPol-v1"): 2,
    ("--env-id", "Pendulum-v1"): 2,
    ("--env-id", "Blackjack-v1"): 2,
    ("--device", "gpu"): 2,
    ("--log", "everything"): 2,
    ("--preset", "hard"): 2,
    ("--run-name", "../x"): 2,
    ("--run-name", "/etc"): 2,
    ("--run-name", "x" * 300): 2,
    ("--run-name", "<script>"): 2,
    ("--run-name", ".."): 2,
    ("--run-name", "a\0b"): 2,
    ("--log-dir", ""): 2,
    ("--log-dir", "a\0b"): 2,
    ("--log-dir", "file"): 5,
    ("--log-dir", "file/below"): 5,
    ("--log-dir", "/proc/nowhere"): 5,
    ("--log-dir", "x" * 300): 5,
    ("--no-such-option", "1"): 2,
}


@pytest.mark.parametrize(("arguments", "code"), MISTAKES.items(), ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: tuple[str, str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    assert main(["reinforce", *arguments]) == code
    output, complaint = capsys.readouterr()
    assert output == ""
    assert complaint.count("\n") == 1
    assert complaint.startswith("rlboard: ")
    assert complaint.strip().isprintable()
    option = "--learning-rate" if arguments[0] == "--lr" else arguments[0]
    assert option in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert Path("file").read_text() == "kept"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_log_directory_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert main(["reinforce", "--log-dir", str(tmp_path / "logs")]) == 5


def test_a_full_disk_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    assert main(["reinforce", "--smoke", "--log-dir", str(tmp_path)]) == 5
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reinforc"]) == 2
    assert "reinforce" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["vision"]])
def test_without_a_command_there_is_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    output, complaint = capsys.readouterr()
    assert "Usage: rlboard" in output
    assert complaint == ""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"rlboard {__version__}"
    assert main(["reinforce", "--help"]) == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert "Williams" in text
    for words in ("--learning-rate,--lr", "default 10000", "1 or more", "minimal|full", "learning_rate 0.001"):
        assert words in text


TEN_LINES = '''"""Counts: the smallest agent there is."""
from dataclasses import dataclass
from rlboard.config import option
from rlboard.events import Event
@dataclass(frozen=True)
class Config:
    steps: int = option(1000, "how far to count", min=1, smoke=5)
def train(config):
    for step in range(config.steps + 1):
        yield Event(step, config.steps, {"count": 2.0 * step}, "count")
'''


def test_one_file_adds_an_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of ten lines in a track's folder is a command with help, a run directory, tabs and a smoke run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(TEN_LINES.splitlines()) == 10
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/count_up.py").write_text(TEN_LINES)
    (tmp_path / "zoo/broken.py").write_text("def train(")
    monkeypatch.setattr("rlboard.cli.build_app", lambda: build_app([Track("zoo", root=tmp_path)]))
    monkeypatch.setattr(sys, "path", list(sys.path))

    assert main(["--help"]) == 0
    output, complaint = capsys.readouterr()
    assert "count-up" in output
    assert "the smallest agent" in output
    assert "skipped" in complaint
    assert "broken.py" in complaint
    assert main(["count-up", "--help"]) == 0
    assert "how far to count" in capsys.readouterr().out
    assert main(["count-up", "--smoke", "--log-dir", str(tmp_path / "logs"), "--run-name", "first"]) == 0
    assert "step 5/5, count 10" in capsys.readouterr().out
    accumulator = EventAccumulator(str(tmp_path / "logs/COUNT_UP/first"))
    accumulator.Reload()
    assert [(point.step, point.value) for point in accumulator.Scalars("count")] == [(n, 2.0 * n) for n in range(6)]
    tags = accumulator.Tags()
    assert "Hyperparameters/text_summary" in tags["tensors"]
    assert json.loads((tmp_path / "logs/COUNT_UP/first/run.json").read_text())["best"]["count"]["value"] == 10


SMOKES = [
    pytest.param(loop, id=loop.name, marks=[pytest.mark.xdist_group("vision-runs")] if "vision" in where else [])
    for track in TRACKS
    for loop in track.loops()
    for where in [loop.track.package if any(option.argument for option in loop.options) else ""]
]
"""One worker has the trained run that the loops of the vision track take as an argument."""


@pytest.mark.parametrize("loop", SMOKES)
def test_every_loop_runs_its_smoke(loop: Loop, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """With the path of a finished run of its track for every argument."""
    finished = {"agents": ("smoke_log_dir", "REINFORCE/smoke"), "vision": ("vision_log_dir", "vision/train/small")}
    fixture, run = finished[loop.track.package]
    command = [*filter(None, (loop.track.group, loop.command)), "--smoke"]
    command += [str(request.getfixturevalue(fixture) / run) for option in loop.options if option.argument]
    assert main([*command, "--log-dir", str(tmp_path), "--run-name", "smoke"]) == 0
    directory = tmp_path / loop.track.directory(loop.name) / "smoke"
    facts = json.loads((directory / "run.json").read_text())
    assert (facts["status"], facts["dropped_records"]) == ("completed", 0)
    assert facts["best"]


def test_what_is_no_terminal_gets_the_lines_of_the_blog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reinforce", "--smoke", "--run-name=a-b"]) == 0
    output, complaint = capfd.readouterr()
    assert complaint == ""
    lines = output.splitlines()
    assert lines[0] == "reinforce: logging to logs/REINFORCE/a-b"
    assert lines[1] == "watch it with: rlboard dashboard --logdir=logs"
    scores = [line for line in lines if line.startswith("# of episode :")]
    assert [line.split(",")[0] for line in scores] == [f"# of episode :{n}" for n in (20, 40, 60)]
    assert all(float(line.rpartition(" ")[2]) > 5 for line in scores)
    assert "reinforce: completed" in output
    for row in ("reward", "eval/mean_reward", "steps", "time", "logs"):
        assert any(row in line for line in lines[-9:]), row


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    ours, terminal = pytest.importorskip("pty").openpty()
    output = b""

    def read() -> None:
        nonlocal output
        with contextlib.suppress(OSError):  # Linux's end of a terminal
            while chunk := os.read(ours, 4096):
                output += chunk

    reader = threading.Thread(target=read)
    reader.start()
    with open(terminal, "w") as file, pytest.MonkeyPatch.context() as patch:  # noqa: PTH123 - it has no path
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", "120")
        patch.setattr(sys, "stdout", file)
        assert main(["reinforce", "--smoke", "--log-dir", str(tmp_path)]) == 0
    reader.join()
    os.close(ours)
    text = output.decode()
    assert "60/60" in text
    assert "━" in text
    assert "steps/s" in text
    assert "ETA" in text
    assert "# of episode" not in text


@pytest.mark.slow  # of a command that trains; that of `runs export` is faster
def test_a_reader_that_goes_away_ends_the_run_without_a_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m rlboard reinforce --episodes 2000 --log-dir {tmp_path} | head -n 3"
    answer = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert len(answer.stdout.splitlines()) == 3
    assert answer.stderr == ""
