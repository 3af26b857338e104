"""Run directories, locks, `run.json`, signals: what holds whatever a loop does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlboard.checkpoint import read_run
from rlboard.cli import main
from rlboard.errors import RlboardError, UsageError
from rlboard.run import _claim, check_log_dir, check_run_name
from tests.conftest import ROOT

CLAIM = """
import sys, time
from pathlib import Path
from rlboard.run import _claim
moment = float(sys.argv[2])
time.sleep(max(0, moment - time.time() - 0.1))
while time.time() < moment: pass
directory, lock = _claim(Path(sys.argv[1]), "same")
print(directory.name)
"""


@pytest.mark.parametrize(("count", "seconds"), [(12, 2), pytest.param(50, 6, marks=pytest.mark.slow)])
def test_starts_at_once_get_directories_of_their_own(count: int, seconds: float, tmp_path: Path) -> None:
    moment = str(time.time() + seconds)
    processes = [
        subprocess.Popen([sys.executable, "-c", CLAIM, tmp_path, moment], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(count)
    ]
    names = [process.communicate()[0].strip() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(names) == sorted(["same", *(f"same-{number}" for number in range(2, count + 1))])


def test_a_run_is_locked_while_it_lives(tmp_path: Path) -> None:
    directory, lock = _claim(tmp_path, "run")
    with pytest.raises(Timeout):
        FileLock(directory / ".lock").acquire(blocking=False)
    lock.release()
    FileLock(directory / ".lock").acquire(blocking=False)


@given(st.text(max_size=150))
def test_an_accepted_name_is_one_directory_below_the_root(name: str) -> None:
    try:
        check_run_name(name)
    except UsageError as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        root = Path("/logs/REINFORCE")
        assert not name or Path(os.path.normpath(root / name)).parent == root
        assert len(os.fsencode(name)) <= 255 or len(name) <= 100


@pytest.mark.parametrize("name", ["run-1", "실험_1", "lr=1e-3", "a.b+c", ""])
def test_plain_names_are_accepted(name: str) -> None:
    check_run_name(name)


@given(st.text(max_size=300))
def test_a_log_dir_is_accepted_or_refused_in_one_line(name: str) -> None:
    try:
        check_log_dir(name)
    except RlboardError as error:
        assert str(error).isprintable()  # noqa: PT017


def test_run_json_tells_what_ran_and_nothing_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    root = tmp_path / "logs"
    assert main(["reinforce", "--smoke", "--seed", "3", "--lr", "1e-3", "--log-dir", str(root)]) == 0
    (directory,) = (root / "REINFORCE").iterdir()
    started, seed = directory.name.rsplit("-", 1)
    assert seed == "seed3"
    datetime.strptime(started, "%Y%m%d-%H%M%S")
    text = (directory / "run.json").read_text()
    assert str(tmp_path) not in text
    assert "hunter2" not in text
    facts = json.loads(text)
    assert set(facts) == {
        "loop", "command", "config", "seed", "git_commit", "versions", "device", "started", "ended", "status", "best",
        "weights_sha256", "dropped_records",
    }  # fmt: skip
    assert facts["command"] == [
        "rlboard", "reinforce", "--learning-rate=1e-3", "--seed=3", "--smoke", "--log-dir=~/logs"
    ]  # fmt: skip
    assert facts["config"]["learning_rate"] == 1e-3
    assert facts["config"]["episodes"] == 60
    assert (facts["seed"], facts["status"], facts["dropped_records"]) == (3, "completed", 0)
    assert facts["best"]["reward"]["step"] in (20, 40, 60)
    assert datetime.fromisoformat(facts["ended"]) > datetime.fromisoformat(facts["started"])
    assert facts["versions"]["torch"]


def test_equal_seeds_and_any_amount_of_logging_give_equal_weights_and_scalars(tmp_path: Path) -> None:
    hashes, curves = {}, {}
    for name, log in (("a", "full"), ("b", "full"), ("c", "minimal")):
        arguments = ["reinforce", "--smoke", "--log-dir", str(tmp_path), "--run-name", name, "--log", log]
        assert main(arguments) == 0
        hashes[name] = json.loads((tmp_path / "REINFORCE" / name / "run.json").read_text())["weights_sha256"]
        accumulator = EventAccumulator(str(tmp_path / "REINFORCE" / name))
        accumulator.Reload()
        curves[name] = {
            tag: [(point.step, point.value) for point in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()["scalars"]
            if tag != "time/fps"
        }
        assert bool(accumulator.Tags()["histograms"]) == (log == "full")
    assert len(set(hashes.values())) == 1
    assert curves["a"] == curves["b"] == curves["c"]
    assert [step for step, _ in curves["a"]["reward"]] == [20, 40, 60]


def test_a_taken_name_gets_a_suffix(tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["reinforce", "--smoke", "--log-dir", str(tmp_path), "--run-name", "mine", "--log=minimal"]) == 0
    assert sorted(path.name for path in (tmp_path / "REINFORCE").iterdir()) == ["mine", "mine-2"]


def test_a_refused_environment_leaves_nothing_behind(tmp_path: Path) -> None:
    assert main(["reinforce", "--log-dir", str(tmp_path / "logs"), "--env-id", "Pendulum-v1"]) == 2
    assert not (tmp_path / "logs").exists()


def test_a_diverging_run_ends_with_its_own_code_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--episodes", "200", "--lr", "1e30", "--log-dir", str(tmp_path), "--run-name", "nan"]
    assert main(["reinforce", *arguments]) == 4
    assert "try a smaller --learning-rate" in capsys.readouterr().err
    assert json.loads((tmp_path / "REINFORCE/nan/run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_in_order_with_no_point_lost(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "rlboard",
            "reinforce",
            "--episodes=1000000",
            "--log-dir",
            tmp_path,
            "--run-name",
            "stopped",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("# of episode :60"):
            break
    process.send_signal(number)
    rest, complaint = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in complaint
    assert "reinforce: interrupted" in rest
    run = read_run(str(tmp_path / "REINFORCE/stopped"))
    accumulator = EventAccumulator(str(tmp_path / "REINFORCE/stopped"))
    accumulator.Reload()
    assert [point.step for point in accumulator.Scalars("reward")] == list(range(20, run.step + 1, 20))
    facts = json.loads((tmp_path / "REINFORCE/stopped/run.json").read_text())
    assert facts["status"] == "interrupted"
    assert facts["weights_sha256"]
    assert run.status == "interrupted"
    assert run.step >= 60


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems' C libraries decide for themselves")
def test_memory_that_is_freed_is_there_for_the_next_tensor() -> None:
    """What is left of eight tensors of 16 MB that are gone: by itself a small part, and then all."""
    script = """
import resource, torch
from pathlib import Path
from rlboard.devices import keep_freed_memory
def left():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    before = resident()
    [torch.ones(2**22) for _ in range(8)]
    return resident() - before
given_back = left()
keep_freed_memory()
print(given_back, left())
"""
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    given_back, kept = map(float, answer.stdout.split())
    assert given_back < 70
    assert kept > 100
