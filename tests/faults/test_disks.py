"""Disks that are full, read-only or gone: training goes on, one warning says so, and the old checkpoint is intact."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlboard.checkpoint import CHECKPOINT, load
from rlboard.cli import main
from rlboard.run import Run
from tests.faults.conftest import Tally
from tests.faults.trials import assert_equal_runs, facts, fingerprint, newest_step, sabotage

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("faults-disks")]

EPISODES, INTERVAL = 400, 20
COMMAND = ["reinforce", "--engine=compiled", f"--episodes={EPISODES}", "--eval-every=100", "--eval-episodes=1"]
STEPS = [100, *(pytest.param(step, marks=pytest.mark.slow) for step in range(INTERVAL, 300, INTERVAL) if step != 100)]
"""Before the end: the last page of a file takes some more, however full the disk is."""
FIRST = pytest.param(0, marks=pytest.mark.slow)


def train(root: Path, *options: str) -> tuple[int, list[str]]:
    """The exit code and the warnings of a training that saves at every event."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code = main([*COMMAND, "--log=minimal", "--save-every=0", "--log-dir", str(root), *options])
    return code, sorted(str(warning.message) for warning in caught)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of a run on a disk that is large enough."""
    root = tmp_path_factory.mktemp("unbroken")
    assert train(root, "--run-name=run") == (0, [])
    return fingerprint(root / "REINFORCE/run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def filled(place: Path, left: int = 0) -> Callable[[Run], None]:
    """Fills the disk but for `left` bytes."""

    def fill(_: Run) -> None:
        with (place / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(0, file.tell() - left))

    return fill


@pytest.mark.parametrize("step", [FIRST, *STEPS])
def test_a_disk_that_fills_up_costs_what_comes_after(
    step: int, small_disk: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    with monkeypatch.context() as patch:
        sabotage(patch, step, filled(small_disk))
        code, complaints = train(small_disk, "--run-name=run")
    assert code == 5
    assert len(complaints) == 2, complaints
    assert all("No space left on device" in complaint for complaint in complaints)
    directory = small_disk / "REINFORCE/run"
    saved = newest_step(directory)
    assert (saved or 0) == max(0, step - INTERVAL)
    (small_disk / "filler").unlink()
    assert train(small_disk, "--resume=run") == (0, [])
    assert_equal_runs(fingerprint(directory), expected)
    tally("2 disk full in mid-run")


@pytest.mark.parametrize("step", STEPS)
def test_a_disk_too_full_for_a_checkpoint_costs_nothing_else(
    step: int, small_disk: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """There is room for the curves, not for a checkpoint; with `--keep` no older one makes room for it."""
    with monkeypatch.context() as patch:
        sabotage(patch, step, filled(small_disk, left=28_672))
        code, complaints = train(small_disk, "--run-name=run", "--keep=99")
    assert code == 0
    assert len(complaints) == 1, complaints
    assert "no checkpoint.pt in" in complaints[0]
    directory = small_disk / "REINFORCE/run"
    assert newest_step(directory) == step - INTERVAL
    assert facts(directory)["failed_checkpoints"] == (EPISODES - step) // INTERVAL + 1
    for part in ("status", "weights", "best", "scalars"):
        assert fingerprint(directory)[part] == expected[part]
    tally("2 disk too full for a checkpoint")


@pytest.mark.parametrize("step", [FIRST, *STEPS])
def test_a_run_directory_that_is_removed_does_not_end_the_training(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    sabotage(monkeypatch, step, lambda run: shutil.rmtree(run.directory))
    code, complaints = train(tmp_path, "--run-name=run")
    assert code == 5
    assert len(complaints) == 2, complaints
    assert "deleted" in complaints[0] + complaints[1]
    output = capsys.readouterr()
    assert f"# of episode :{EPISODES}" in output.out, "it went on to its end"
    assert "records could not be written" in output.err
    assert not (tmp_path / "REINFORCE/run").exists()
    tally("2 run directory removed")


def test_a_read_only_log_root_is_refused(small_disk: Path, tally: Tally, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(small_disk, "--run-name=run") == (0, [])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    capsys.readouterr()
    for options in (["--run-name=other"], ["--resume=run", f"--episodes={EPISODES + 20}"]):
        assert train(small_disk, *options) == (5, [])
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1
        assert "not writable" in complaint
    options = ["--log-dir", str(small_disk.parent), f"--resume={small_disk}/REINFORCE/run/checkpoint.pt"]
    assert main(["reinforce", *options, f"--episodes={EPISODES + 20}"]) == 5
    assert "cannot be locked" in capsys.readouterr().err
    assert load(small_disk / "REINFORCE/run" / CHECKPOINT)["step"] == EPISODES
    tally("2 read-only log root", 3)
