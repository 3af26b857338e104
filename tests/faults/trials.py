"""What the fault suite shares: the loops that are put to the test, runs that die, and runs compared.

As a program (`python -m tests.faults.trials LOOP ROOT KILLS SEED`) it trains a loop again and again, kills the process
at a random or an aimed moment, resumes it, and compares what comes of it with a run that nobody killed. Everything is
imported once: each training is a fork of this process, which has one thread, so that a kill costs no start-up.
Without KILLS but with a COUNT, it starts that many at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlboard.checkpoint import BEST, CHECKPOINT, load
from rlboard.cli import main
from rlboard.eventfile import read_events, read_scalars, write
from rlboard.events import Events
from rlboard.instruments import INSTRUMENTS
from rlboard.resume import checkpoints_of
from rlboard.run import Run


class Trial(NamedTuple):
    """A small training: its command, the folder of its runs, and the steps from one event to the next."""

    command: list[str]
    folder: str
    interval: int

    def arguments(self, root: Path, *options: str) -> list[str]:
        return [*self.command, "--log-dir", str(root), *options]

    def resumed(self, root: Path, name: str, *options: str) -> list[str]:
        """The command that goes on with the run `name`: of its own options none are given again."""
        return [*self.words, "--log-dir", str(root), f"--resume={self.folder}/{name}", *self.plumbing, *options]

    @property
    def words(self) -> list[str]:
        return [word for word in self.command if not word.startswith("-")]

    @property
    def plumbing(self) -> list[str]:
        return [word for word in self.command if word.startswith("--log=")]

    def directory(self, root: Path, name: str) -> Path:
        return root / self.folder / name


LOOPS = {
    "gym": Trial(
        ["reinforce", "--engine=gym", "--episodes=160", "--eval-every=40", "--eval-episodes=1", "--log=full"],
        "REINFORCE",
        interval=20,
    ),
    "compiled": Trial(
        ["reinforce", "--engine=compiled", "--episodes=1000", "--eval-every=200", "--eval-episodes=1", "--log=minimal"],
        "REINFORCE",
        interval=20,
    ),
    "vision": Trial(
        [
            *("vision", "train", "--data=shapes", "--images=160", "--width=8", "--batch-size=32", "--epochs=3"),
            *("--threads=1", "--log-every=2", "--picture-every=1", "--log=full"),
        ],
        "vision/train",
        interval=2,
    ),
    "gan": Trial(
        [
            *("vision", "gan", "--data=shapes", "--images=160", "--width=4", "--batch-size=32", "--steps=16"),
            *("--judge-images=64", "--quality-images=32", "--judge-every=4"),
            *("--threads=1", "--log-every=2", "--log=full"),
        ],
        "vision/gan",
        interval=2,
    ),
    "embed": Trial(
        [
            *("vision", "embed", "--data=shapes", "--images=128", "--width=8", "--batch-size=32", "--epochs=4"),
            *("--limit=40", "--threads=1", "--log-every=2", "--picture-every=2", "--log=full"),
        ],
        "vision/embed",
        interval=2,
    ),
    "words": Trial(
        [
            *("vision", "words", "--sentences=1000", "--steps=24", "--batch-size=256", "--log-every=2"),
            *("--test-every=4", "--picture-every=8", "--log=full"),
        ],
        "vision/words",
        interval=2,
    ),
    "ppo": Trial(
        [
            *("ppo", "--engine=compiled", "--total-timesteps=3072", "--batch-size=128", "--n-epochs=2"),
            *("--log-every=256", "--eval-every=1024", "--eval-episodes=1", "--log=full"),
        ],
        "PPO",
        interval=256,
    ),
    "dqn": Trial(
        [
            *("dqn", "--engine=gym", "--total-timesteps=2000", "--learning-starts=200", "--gradient-steps=16"),
            *("--log-every=100", "--eval-every=500", "--eval-episodes=1", "--log=full"),
        ],
        "DQN",
        interval=100,
    ),
}
"""The loops that the suite kills, fills the disks of and resumes: a new one is a line here."""

SMALL = {
    "gym": Trial(
        ["reinforce", "--engine=gym", "--episodes=60", "--eval-every=20", "--eval-episodes=1", "--log=minimal"],
        "REINFORCE",
        20,
    ),
    "compiled": Trial(
        ["reinforce", "--engine=compiled", "--episodes=60", "--eval-every=20", "--eval-episodes=1", "--log=minimal"],
        "REINFORCE",
        20,
    ),
    "vision": Trial(
        [
            *("vision", "train", "--data=shapes", "--images=64", "--width=8", "--batch-size=32", "--epochs=1"),
            *("--threads=1", "--log-every=1", "--log=minimal", "--no-tta"),
        ],
        "vision/train",
        1,
    ),
    "gan": Trial(
        [
            *("vision", "gan", "--data=shapes", "--images=64", "--width=2", "--batch-size=16", "--steps=2"),
            *("--judge-images=32", "--quality-images=8", "--threads=1", "--log-every=1", "--log=minimal"),
        ],
        "vision/gan",
        1,
    ),
    "embed": Trial(
        [
            *("vision", "embed", "--data=shapes", "--images=64", "--width=8", "--batch-size=32", "--epochs=1"),
            *("--threads=1", "--log-every=1", "--log=minimal"),
        ],
        "vision/embed",
        1,
    ),
    "words": Trial(
        [
            *("vision", "words", "--sentences=1000", "--steps=2", "--batch-size=64"),
            *("--log-every=1", "--test-every=1", "--log=minimal"),
        ],
        "vision/words",
        1,
    ),
    "ppo": Trial(
        [
            *("ppo", "--engine=compiled", "--total-timesteps=768", "--batch-size=128", "--n-epochs=1"),
            *("--log-every=256", "--eval-every=512", "--eval-episodes=1", "--log=minimal"),
        ],
        "PPO",
        256,
    ),
    "dqn": Trial(
        [
            *("dqn", "--engine=gym", "--total-timesteps=600", "--learning-starts=200", "--gradient-steps=4"),
            *("--log-every=200", "--eval-every=400", "--eval-episodes=1", "--log=minimal"),
        ],
        "DQN",
        200,
    ),
}
"""The loops at their shortest: a kill before every single change of the disk must not take all day."""

UNEQUAL = ("time/", "Memory/")  # the values of what a process, and not its training, comes to


def facts(directory: Path) -> dict[str, Any]:
    """What the `run.json` of a run says."""
    loaded: dict[str, Any] = json.loads((directory / "run.json").read_text())
    return loaded


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of every tag; fails where steps do not increase, or TensorBoard's reader finds others."""
    columns = read_scalars(directory)
    found = {tag: list(zip(columns[tag].step.tolist(), columns[tag].value.tolist(), strict=True)) for tag in columns}
    for tag in found:
        assert (np.diff(columns[tag].step) > 0).all(), f"{directory}: steps of {tag} do not increase"
    accumulator = EventAccumulator(str(directory), {"scalars": 0})
    accumulator.Reload()
    theirs = {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in found}
    assert repr(theirs) == repr(found)  # a NaN equals nothing
    return found


def fingerprint(directory: Path) -> dict[str, Any]:
    """All that must be equal in equal runs: weights, best, scalars, and every picture, histogram and text."""
    points = {
        tag: [step for step, _ in points] if tag.startswith(UNEQUAL) else points
        for tag, points in curves(directory).items()
    }
    others = []
    for path in sorted(directory.glob("*tfevents*")):
        for event in read_events(path):
            if event.graph_def:
                others.append(("graph", event.step, hashlib.sha256(event.graph_def).hexdigest()))
            for value in event.summary.value:
                if value.HasField("simple_value") or b"compiled in" in b"".join(value.tensor.string_val):
                    continue  # the first run on a machine says how long that took
                content = b"" if value.tag.startswith("_hparams_") else value.SerializeToString(deterministic=True)
                others.append((value.tag, event.step, hashlib.sha256(content).hexdigest()))
    best = load(directory / BEST)
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in best["model"].values())).hexdigest()
    told = facts(directory)
    return {
        "status": told["status"],
        "weights": told["weights_sha256"],
        "best": told["best"],
        "best checkpoint": (best["step"], weights),
        "last checkpoint": load(directory / CHECKPOINT)["step"],
        "scalars": points,
        "others": others,
    }


def assert_equal_runs(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares two fingerprints, part by part, so that a failure names what differs.

    No checkpoint has gradients: what is resumed between the last step of an epoch and its test cannot draw them.
    """
    for part, value in expected.items():
        if part == "others":
            kept = set(found[part])
            assert found[part] == [each for each in value if each in kept or not each[0].startswith("Gradients/")]
        elif isinstance(value, dict):
            assert found[part].keys() == value.keys(), part
            for name in value:
                assert found[part][name] == value[name], f"{part}: {name}"
        else:
            assert found[part] == value, part


def sabotage(patch: pytest.MonkeyPatch, step: int, act: Callable[[Run], object]) -> None:
    """Has every run with `--log=minimal` do `act` as soon as it comes to `step`."""

    def saboteur(events: Events, run: Run) -> Events:
        done = False
        for event in events:
            if event.step >= step and not done:
                done = True
                act(run)
            yield event

    patch.setitem(cast("dict[str, Any]", INSTRUMENTS), "minimal", (saboteur, *INSTRUMENTS["minimal"]))


# Death within this process: at an exact place, in no time.


class Killed(BaseException):
    """Nothing after it is written."""


@contextlib.contextmanager
def killed_before(call: float) -> Iterator[list[str]]:
    """Ends what runs inside before its `call`-th change of the disk, and lets nothing be written after that.

    Yields the changes made, by name. What a SIGKILL leaves is on the disk then: `finally` clauses run here, but they
    change nothing, and what waited in memory is gone.
    """
    made: list[str] = []
    dead = False

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def guard(*arguments: Any, **options: Any) -> Any:
            nonlocal dead
            dead = dead or len(made) >= call
            if dead:
                raise Killed
            made.append(f"{name} {arguments[-1]}")
            return function(*arguments, **options)

        return guard

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_flush_all", lambda: None)  # another thread's
        for name in ("replace", "rename", "link", "unlink", "mkdir", "fsync", "ftruncate", "truncate"):
            patch.setattr(os, name, guarded(name, getattr(os, name)))
        patch.setattr(write, "_pwrite", guarded("write", write._pwrite))
        with contextlib.suppress(Killed):
            yield made
        write._after_fork_in_child()  # a process that is gone has no buffers


# Death of a process of its own.


def forked(
    arguments: Sequence[str], errors: Path, modules: Path | None = None, gate: tuple[int, int] | None = None
) -> int:
    """Starts `rlboard` in a fork of this process and returns its number; what it complains of goes to `errors`.

    The fork waits until the second end of `gate`, a pipe, is closed.
    """
    if child := os.fork():
        return child
    code = 70
    try:
        if gate:
            os.close(gate[1])
            os.read(gate[0], 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        code = main(arguments)
        if modules:
            modules.write_text("\n".join(sys.modules))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - the fork ends here, whatever it is
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int | None:
    """The exit code of a child, negative for a signal; None while it runs."""
    number, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if number else None


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def warm_up(trial: Trial, root: Path) -> None:
    """Imports here what a training imports: a first one, in a fork, tells what that is."""
    import torch

    torch.set_num_threads(1)
    if trial.words[0] == "vision":
        from vision._data import load_dataset

        load_dataset("shapes")  # drawn here, and not in every fork
    modules = root / "modules.txt"
    child = forked(trial.arguments(root, "--run-name=warm-up"), root / "errors.txt", modules)
    assert wait(child) == 0, (root / "errors.txt").read_text()
    for name in modules.read_text().splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


AIMS = ("anywhere", "save", "log", "start")


def kill(child: int, aim: str, directory: Path, seconds: float, generator: random.Random) -> bool:
    """Kills `child` at a moment of this kind; returns whether it was still alive.

    Args:
        directory: of its run.
        seconds: how long it takes where nobody kills it.
    """
    sightings = generator.randint(1, 12)
    deadline = time.monotonic() + generator.uniform(0, 0.15 if aim == "start" else seconds)
    before: object = None
    while ended_at(child) is None:
        if aim in ("anywhere", "start"):
            if time.monotonic() >= deadline:
                break
            time.sleep(0.001)
            continue
        now = sighting(directory, aim)
        if now and now != before:
            sightings -= 1
            if not sightings:
                break
        before = now
    if _codes.get(child) is not None:
        return False
    os.kill(child, signal.SIGKILL)
    _codes[child] = wait(child)
    return _codes[child] == -signal.SIGKILL


_codes: dict[int, int] = {}


def ended_at(child: int) -> int | None:
    """As `ended`, but it may be asked again."""
    if child not in _codes and (code := ended(child)) is not None:
        _codes[child] = code
    return _codes.get(child)


def sighting(directory: Path, aim: str) -> object:
    """A trace of a checkpoint that is being written, or of the event files' growth."""
    try:
        with os.scandir(directory) as entries:
            if aim == "save":
                return sorted(entry.name for entry in entries if entry.name.endswith(".tmp"))
            return sorted((entry.name, entry.stat().st_size) for entry in entries if "tfevents" in entry.name)
    except OSError:
        return None


def newest_step(directory: Path) -> int | None:
    """The step of the newest checkpoint, which must be whole; None where there is none."""
    paths = checkpoints_of(directory)
    return int(load(paths[0])["step"]) if paths else None


def last_logged(directory: Path) -> int:
    try:
        columns = read_scalars(directory)
    except FileNotFoundError:
        return 0
    return max((int(columns[tag].step.max()) for tag in columns), default=0)


def main_of_trials(name: str, root: Path, kills: int, seed: int) -> None:
    """Kills and resumes until `kills` processes have died; prints a line of JSON for each run that came to its end."""
    trial, generator = LOOPS[name], random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    errors = root / "errors.txt"
    warm_up(trial, root)
    began = time.monotonic()
    assert wait(forked(trial.arguments(root, "--run-name=unbroken"), errors)) == 0, errors.read_text()
    seconds = time.monotonic() - began
    expected = fingerprint(trial.directory(root, "unbroken"))
    died, number = 0, 0
    while died < kills:
        number += 1
        run = f"run{number}"
        every = generator.choice(["0", "0", "0.05"])
        told = kill_and_resume(trial, root, run, every, seconds, generator, kills - died)
        died += sum(told["aims"].values())
        assert_equal_runs(fingerprint(trial.directory(root, told["run"])), expected)
        say(told)
        for old in (f"run{number - 3}", f"run{number - 3}-again"):
            shutil.rmtree(trial.directory(root, old), ignore_errors=True)


def kill_and_resume(
    trial: Trial, root: Path, run: str, every: str, seconds: float, generator: random.Random, most: int
) -> dict[str, Any]:
    """One run, killed up to three times and then left alone."""
    errors = root / "errors.txt"
    aims: dict[str, int] = {}
    directory = trial.directory(root, run)
    options = [f"--save-every={every}"]
    child = forked(trial.arguments(root, f"--run-name={run}", *options), errors)
    for _ in range(min(most, generator.randint(1, 3))):
        aim = generator.choice(AIMS)
        if not kill(child, aim, directory, seconds, generator):
            break
        aims[aim] = aims.get(aim, 0) + 1
        if (directory / "run.json").exists():
            saved = newest_step(directory)
            if every == "0":
                assert last_logged(directory) - (saved or 0) <= trial.interval
            child = forked(trial.resumed(root, run, *options), errors)
        else:  # there is nothing yet that could be resumed
            run = f"{run}-again"
            directory = trial.directory(root, run)
            child = forked(trial.arguments(root, f"--run-name={run}", *options), errors)
    while (code := ended_at(child)) is None:
        time.sleep(0.002)
    complaint = errors.read_text()
    finished = code == 2 and "is complete" in complaint  # killed after its last word
    assert code == 0 or finished, f"{code}: {complaint}"
    assert "Traceback" not in complaint
    assert "earlier checkpoint" not in complaint
    return {"run": run, "aims": aims, "save_every": every}


def main_of_starts(name: str, root: Path, count: int) -> None:
    """Starts `count` trainings of one name at once, then as many that resume one run; prints how they ended."""
    trial = LOOPS[name]
    root.mkdir(parents=True, exist_ok=True)
    warm_up(trial, root)
    codes: dict[str, Any] = {}
    for kind, arguments in (
        ("start", trial.arguments(root, "--run-name=same")),
        ("resume", trial.resumed(root, "killed", "--save-every=0")),
    ):
        if kind == "resume":
            errors = root / "errors.txt"
            child = forked(trial.arguments(root, "--run-name=killed", "--save-every=0"), errors)
            while not (trial.directory(root, "killed") / CHECKPOINT).exists():
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            wait(child)
        gate = os.pipe()
        children = [forked(arguments, root / f"{kind}{number}.txt", gate=gate) for number in range(count)]
        os.close(gate[1])
        codes[kind] = [wait(child) for child in children]
    say(codes)


def say(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) == 5:
        main_of_trials(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main_of_starts(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
