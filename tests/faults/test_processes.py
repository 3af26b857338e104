"""Several processes on one run, fifty starts at once, and locks that the dead have left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from rlboard.cli import main
from tests.conftest import ROOT
from tests.faults.conftest import Tally
from tests.faults.trials import LOOPS, assert_equal_runs, curves, facts, fingerprint, killed_before

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("faults-processes"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # a process that is killed closes none
]

COMMAND = ["reinforce", "--engine=gym", "--episodes=60", "--eval-episodes=1", "--log=minimal", "--save-every=0"]


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A run that was killed after its first checkpoints."""
    with killed_before(60):
        main([*COMMAND, "--log-dir", str(tmp_path), "--run-name=run"])
    directory = tmp_path / "REINFORCE/run"
    assert facts(directory)["status"] == "running"
    return directory


def resume(directory: Path) -> int:
    return main(["reinforce", "--log-dir", str(directory.parent.parent), "--resume=run", "--log=minimal"])


def test_a_run_that_somebody_else_has_is_left_alone(
    killed: Path, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, killed / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        before = {path.name: path.read_bytes() for path in killed.iterdir()}
        assert resume(killed) == 2
        assert "is still running" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in killed.iterdir()} == before
        other.kill()
    assert resume(killed) == 0, "its process is dead, the lock is free"
    assert [step for step, _ in curves(killed)["reward"]] == [20, 40, 60]
    tally("5 two processes on one run")


OWNERS = {"a living process": 1, "this process": os.getpid(), "a dead one": 2**22 - 1, "none": "", "zeros": "\0" * 4096}


@pytest.mark.parametrize(
    "owner", ["a living process", *(pytest.param(owner, marks=pytest.mark.slow) for owner in list(OWNERS)[1:])]
)
def test_a_stale_lock_stops_nobody(owner: str, killed: Path, tally: Tally) -> None:
    """The kernel frees the lock of a process that dies; what the file says, of a living process or none, is no lock."""
    (killed / ".lock").write_text(f"{OWNERS[owner]}\n")
    assert resume(killed) == 0
    assert facts(killed)["status"] == "completed"
    with FileLock(killed / ".lock", timeout=0):
        tally("5 stale lock")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
@pytest.mark.parametrize("name", ["gym", "compiled"])
def test_fifty_starts_at_once(name: str, tmp_path: Path, tally: Tally) -> None:
    """Each has a directory of its own; of fifty that resume one run, one does."""
    root = tmp_path / "logs"
    answer = subprocess.run(
        [sys.executable, "-m", "tests.faults.trials", name, root, "50"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    trial = LOOPS[name]
    expected = fingerprint(trial.directory(root, "warm-up"))
    assert told["start"] == [0] * 50
    names = ["same", *(f"same-{number}" for number in range(2, 51))]
    assert {path.name for path in (root / trial.folder).iterdir()} == {"warm-up", "killed", *names}
    for each in names:
        assert_equal_runs(fingerprint(trial.directory(root, each)), expected)
    tally(f"5 fifty starts at once, {name}", 50)
    assert told["resume"].count(0) >= 1
    assert set(told["resume"]) == {0, 2}
    complaints = [(root / f"resume{number}.txt").read_text() for number in range(50)]
    refused = [complaint for complaint in complaints if complaint]
    assert all("is still running" in each or "is complete" in each for each in refused), refused
    assert len(facts(trial.directory(root, "killed"))["resumed"]) == told["resume"].count(0) == 1
    assert_equal_runs(fingerprint(trial.directory(root, "killed")), expected)
    tally(f"5 fifty that resume one run, {name}", 50)
