"""Event files that are torn, flipped or garbage: what is behind the checkpoint comes again, what is before it stays."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlboard.checkpoint import CHECKPOINT, load
from rlboard.cli import main
from rlboard.eventfile import EventFile, read_scalars
from tests.browser import eventually, get, tensorboard
from tests.faults.conftest import Tally
from tests.faults.trials import LOOPS, SMALL, Trial, assert_equal_runs, curves, facts, fingerprint, sabotage

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("faults-event-files")]

COMMAND = ["reinforce", "--eval-every=20", "--eval-episodes=1", "--log=minimal", "--save-every=0"]
TIMES = [1, pytest.param(50, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log root with a run `half` of 40 episodes, its checkpoint at 20, and one `whole` of 80."""
    root = tmp_path_factory.mktemp("trained")
    for name, episodes in (("half", 40), ("whole", 80)):
        options = ["--engine=gym", f"--episodes={episodes}", "--log-dir", str(root), f"--run-name={name}"]
        assert main([*COMMAND, *options]) == 0
    half = root / "REINFORCE/half"
    for path in half.glob("checkpoint.pt*"):
        path.unlink()
    return root / "REINFORCE"


@pytest.fixture
def expected(trained: Path) -> dict[str, Any]:
    found = fingerprint(trained / "whole")
    del found["others"]  # the text of the hyperparameters tells how many episodes were planned at first
    return found


def resume(directory: Path) -> int:
    options = ["--log-dir", str(directory.parent.parent), "--resume=half", "--episodes=80"]
    return main([*COMMAND, *options])


def torn(generator: random.Random, content: bytes, kept: int) -> bytes:
    return content[: generator.randrange(kept, len(content))]


def flipped(generator: random.Random, content: bytes, kept: int) -> bytes:
    damaged = bytearray(content)
    for _ in range(generator.randint(1, 5)):
        damaged[generator.randrange(kept, len(content))] ^= generator.randrange(1, 256)
    return bytes(damaged)


def followed_by_garbage(generator: random.Random, content: bytes, kept: int) -> bytes:
    return content[: generator.randrange(kept, len(content))] + generator.randbytes(generator.randrange(1, 5000))


Damage = Callable[[random.Random, bytes, int], bytes]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("damage", [torn, flipped, followed_by_garbage])
def test_damage_behind_the_checkpoint_is_cut_off(
    damage: Damage, times: int, trained: Path, expected: dict[str, Any], tmp_path: Path, tally: Tally
) -> None:
    generator = random.Random(times)
    for number in range(times):
        directory = shutil.copytree(trained / "half", tmp_path / f"{number}/REINFORCE/half")
        (path,) = directory.glob("*tfevents*")
        offset = load(directory / "checkpoint-20.pt")["position"]["offset"]
        path.write_bytes(damage(generator, path.read_bytes(), offset))
        assert resume(directory) == 0
        assert_equal_runs(fingerprint(directory), expected)
        tally(f"4 event file {damage.__name__.replace('_', ' ')}")


@pytest.mark.parametrize("times", TIMES)
def test_damage_before_the_checkpoint_costs_no_more_than_it_hit(
    times: int, trained: Path, expected: dict[str, Any], tmp_path: Path, tally: Tally
) -> None:
    """The run goes on to the same weights, or is refused in a line; no reader sees a step twice or a wrong value."""
    generator = random.Random(times)
    for number in range(times):
        directory = shutil.copytree(trained / "half", tmp_path / f"{number}/REINFORCE/half")
        (path,) = directory.glob("*tfevents*")
        content = path.read_bytes()
        offset = load(directory / "checkpoint-20.pt")["position"]["offset"]
        path.write_bytes(flipped(generator, content[:offset], 0) + content[offset:])
        code = resume(directory)
        if code == 0:
            assert facts(directory)["weights_sha256"] == expected["weights"]
            columns = read_scalars(directory)
            for tag in columns:
                points = list(zip(columns[tag].step.tolist(), columns[tag].value.tolist(), strict=True))
                if not tag.startswith("time/"):
                    assert [point for point in expected["scalars"][tag] if point in points] == points
                    assert set(expected["scalars"][tag][1:]) <= set(points)
        else:
            assert code == 3
        tally("4 event file flipped before the checkpoint")


@pytest.mark.parametrize(
    "name",
    [
        "events.out.tfevents.9999999999.host.1.0",
        pytest.param("events.out.tfevents.0000000000.host.1.0", marks=pytest.mark.slow),
        pytest.param("tfevents", marks=pytest.mark.slow),
    ],
)
def test_garbage_beside_the_event_file(
    name: str, trained: Path, expected: dict[str, Any], tmp_path: Path, tally: Tally
) -> None:
    directory = shutil.copytree(trained / "half", tmp_path / "REINFORCE/half")
    (directory / name).write_bytes(random.Random(name).randbytes(3000))
    assert resume(directory) == 0
    columns = read_scalars(directory)
    assert set(columns) == set(expected["scalars"])
    assert columns["reward"].step.tolist() == [20, 40, 60, 80]
    assert columns["reward"].value.tolist() == [value for _, value in expected["scalars"]["reward"]]
    assert facts(directory)["weights_sha256"] == expected["weights"]
    tally("4 garbage beside the event file")


def day_back() -> float:
    return real_time() - 86_400


real_time = time.time


@pytest.mark.parametrize(
    ("name", "trial"),
    [("gym", SMALL["gym"]), *(pytest.param(*item, marks=pytest.mark.slow) for item in LOOPS.items())],
    ids=["small", *LOOPS],
)
def test_the_clock_goes_back_by_a_day_between_two_sessions(
    name: str,
    trial: Trial,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
    request: pytest.FixtureRequest,
) -> None:
    """Sessions of today, of yesterday, and of today again."""
    directory = trial.directory(tmp_path, "run")
    assert main(trial.arguments(tmp_path, "--run-name=unbroken")) == 0

    class EnoughError(Exception):
        pass

    def until(step: int) -> None:
        def enough(_: object) -> None:
            raise EnoughError

        with monkeypatch.context() as patch:
            sabotage(patch, step, enough)
            arguments = trial.resumed(tmp_path, "run", "--save-every=0", "--log=minimal")
            if not directory.exists():
                arguments = trial.arguments(tmp_path, "--run-name=run", "--save-every=0", "--log=minimal")
            with pytest.raises(EnoughError):
                main(arguments)

    until(trial.interval + 1)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", day_back)
        patch.setattr("rlboard.writer.EventFile", partial(EventFile, clock=day_back))
        until(2 * trial.interval + 1)
    assert main(trial.resumed(tmp_path, "run", "--log=minimal")) == 0
    found, expected = fingerprint(directory), fingerprint(trial.directory(tmp_path, "unbroken"))
    del found["others"], expected["others"]
    assert_equal_runs(found, expected)
    paths = sorted(directory.glob("*tfevents*"))
    assert len(paths) == 3
    assert paths == sorted(paths, key=lambda path: path.stat().st_mtime_ns), "each file's name sorts after the last"
    if request.node.get_closest_marker("slow"):
        points = curves(directory)
        for fast in ("true", "false"):
            with tensorboard(tmp_path, f"--load_fast={fast}", "--samples_per_plugin=scalars=100000") as url:
                run = f"{trial.folder}/run"

                def loaded(url: str = url, run: str = run) -> bool:
                    return len(get(url, "plugin/scalars/tags").get(run, ())) == len(points)

                eventually(loaded)
                for tag, expected_points in points.items():
                    answer = get(url, "plugin/scalars/scalars", run=run, tag=tag)
                    assert [(step, value) for _, step, value in answer] == expected_points
    tally(f"6 clock back by a day, {name}")


def test_a_run_without_any_event_file_goes_on_only_as_a_fork(trained: Path, tmp_path: Path, tally: Tally) -> None:
    directory = shutil.copytree(trained / "half", tmp_path / "REINFORCE/half")
    for path in directory.glob("*tfevents*"):
        path.unlink()
    assert not (directory / CHECKPOINT).exists()
    assert resume(directory) == 3
    options = ["--log-dir", str(tmp_path), "--resume=half", "--fork", "--run-name=child", "--episodes=80"]
    assert main([*COMMAND, *options]) == 0
    assert [step for step, _ in curves(tmp_path / "REINFORCE/child")["reward"]] == [40, 60, 80]
    tally("4 event file missing")
