"""A run taken up where it was killed, stopped or finished: the same directory, the same curves, the same weights.

The newest checkpoint that is whole decides what comes next. The event files are cut to their length at that moment, and
a new one, whose name sorts after them, goes on: so every reader sees each step once, and none is missing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from rlboard.checkpoint import CHECKPOINT, duplicate, remove, saved_config, verified
from rlboard.config import Value, printable
from rlboard.errors import DataError, StorageError, UsageError
from rlboard.eventfile import event_files, is_boundary, truncate
from rlboard.registry import Loop
from rlboard.run import KEPT
from rlboard.runs.find import LOCK, LoggedRun, find_runs, select

if TYPE_CHECKING:
    from filelock import BaseFileLock

LAST = "last"
TAIL_BYTES = 64
EARLIER = re.compile(r"checkpoint-[0-9]{1,19}\.pt")


@dataclass
class Resumption:
    """What is gone on with.

    Attributes:
        directory: of the run that was.
        facts: what its `run.json` says.
        config: what it goes on with: its own options, and those of the new command that may change.
        changed: the latter, each with the value before.
        state: its newest checkpoint that can be used, and its `path`; None where it was ended before there was one.
        fork: whether a run of its own goes on, and leaves this one as it is.
        notices: what the user should know.
        lock: held for the run; None for a fork.
    """

    directory: Path
    facts: dict[str, Any]
    config: dict[str, Value]
    changed: dict[str, tuple[Value, Value]]
    state: dict[str, Any] | None
    path: Path | None
    fork: bool
    notices: list[str] = field(default_factory=list)
    lock: BaseFileLock | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process may have all of it but the lock."""
        return {**self.__dict__, "lock": None}

    @property
    def step(self) -> int:
        return self.state["step"] if self.state else 0

    def findings(self, at: str) -> dict[str, Any]:
        """What `run.json` says of it: whose child the run is, or when it was resumed with which options changed."""
        if self.fork:
            return {"parent": {"run": self.directory.name, "step": self.step}}
        changed = {name: {"before": before, "now": now} for name, (before, now) in self.changed.items()}
        earlier = self.facts.get("resumed", [])
        return {"resumed": [*earlier, {"step": self.step, "at": at, "changed": changed}]}

    def release(self) -> None:
        """Lets the run be, as it is."""
        if self.lock:
            self.lock.release()

    def cut(self) -> None:
        """Takes back what came after the checkpoint: it will come again. Raises OSError."""
        if self.path and self.path.name != CHECKPOINT:
            duplicate(self.path, self.directory / CHECKPOINT)
        for path in checkpoints_of(self.directory)[1:]:
            if _step_of(path) > self.step:  # it would count as newer than what is saved next
                remove(path)
        position = self.state["position"] if self.state else None
        for path in event_files(self.directory):
            if position is None or path.name > position["file"]:
                path.unlink()
            elif path.name == position["file"]:
                truncate(path, position["offset"])


def prepare(loop: Loop, name: str, root: Path, given: Mapping[str, Value], *, fork: bool = False) -> Resumption:
    """The run of `loop` that `name` means, locked and ready to go on with the options that are `given`.

    Args:
        loop: which loop the command runs.
        name: `last`, a run's name or directory, or one of its checkpoints.
        root: the log root.
        given: the options of the new command.
        fork: see `Resumption`; every option may change then.

    Raises:
        UsageError: there is no such run, it is of another loop, runs still, or may not change as it is asked to.
        DataError: none of its checkpoints can be used.
        StorageError: its directory cannot be written.
    """
    directory, only = _find(loop, name, root)
    lock = None if fork else _lock(directory)
    try:
        saved_loop, config, facts = saved_config(directory)
        if (saved_loop.track.package, saved_loop.name) != (loop.track.package, loop.name):
            raise UsageError(f"{_where(directory)} is of {facts['loop']}, not of {loop.track.package}/{loop.name}")
        changed = {key: (config[key], value) for key, value in given.items() if config[key] != value}
        fixed = {option.name for option in loop.options if not option.resume}
        if fork and "seeds" in facts:
            raise UsageError(f"{_where(directory)} is a group of seeds: --fork one of its runs")
        if not fork and (refused := [_change(key, *changed[key]) for key in changed if key in fixed]):
            rest = "leave it out" if len(refused) == 1 else "leave them out"
            raise UsageError(f"{_where(directory)} was run with {', '.join(refused)}: {rest}, or add --fork")
        path, state, notices = _newest(directory, loop, config, only, check_position=not fork)
    except BaseException:
        if lock:
            lock.release()
        raise
    return Resumption(directory, facts, config | dict(given), changed, state, path, fork, notices, lock)


def of_job(loop: Loop, config: Mapping[str, Value], root: Path, job: str) -> LoggedRun | None:
    """The newest run of `loop` with this `config` that torchrun's `job` has begun; None where there is none."""
    if not job or not root.is_dir():
        return None
    name = f"{loop.track.package}/{loop.name}"
    runs = [run for run in find_runs(root) if run.loop == name and run.facts.get("job") == job]
    mine = [run for run in runs if run.facts.get("config") == config]
    return max(mine, key=lambda run: str(run.facts.get("started", "")), default=None)


def _where(directory: Path) -> str:
    return f"--resume {printable(directory, 200)}"


def _change(name: str, before: Value, now: Value) -> str:
    return f"{name} {printable(before)}, not {printable(now)}"


def _find(loop: Loop, name: str, root: Path) -> tuple[Path, Path | None]:
    """The directory that `name` means, and the checkpoint if it is one."""
    path = Path(name)
    with contextlib.suppress(OSError):  # such as a name that is too long
        if path.suffix == ".pt" and path.is_file():
            return path.parent, path
    runs = find_runs(root)
    if name == LAST:
        mine = [run for run in runs if run.loop == f"{loop.track.package}/{loop.name}"]
        groups = {run.name for run in mine if "seeds" in run.facts}
        if not mine:
            raise UsageError(f"--resume: there is no run of {loop.command} in {printable(root, 200)}")
        alone = [run for run in mine if run.name.rpartition("/")[0] not in groups]
        return max(alone, key=lambda run: str(run.facts.get("started", ""))).directory, None
    chosen, complaints = select(runs, [name])
    if complaints or len(chosen) > 1:
        raise UsageError(f"--resume: {complaints[0] if complaints else f'{printable(name)} means several runs'}")
    return chosen[0].directory, None


def _lock(directory: Path) -> BaseFileLock:
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=1)  # whoever looks whether it is held holds it for a moment
    except Timeout:
        raise UsageError(f"{_where(directory)} is still running: stop it first, or add --fork") from None
    except OSError as error:
        raise StorageError(f"{_where(directory)} cannot be locked: {error.strerror or error}") from None
    return lock


def _newest(
    directory: Path, loop: Loop, config: dict[str, Value], only: Path | None, *, check_position: bool
) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """The newest checkpoint that can be used, where it lies, and what is wrong with those that are newer.

    Raises:
        DataError: there are some, and none can be used.
    """
    complaints: list[str] = []
    for path in [only] if only else checkpoints_of(directory):
        try:
            state = verified(path, loop, config)
            if state.get("loop") is None:
                raise DataError(f"{printable(path, 200)} cannot be resumed from: it holds the network alone")
            _check_types(path, state)
            if check_position:
                _check_position(directory, path, state)
        except DataError as error:
            complaints.append(str(error))
        else:
            return path, state, complaints
    if complaints:
        raise DataError("; ".join(complaints))
    return None, None, []


def checkpoints_of(directory: Path) -> list[Path]:
    """The checkpoints of a run that it can be resumed from, the newest first."""
    earlier = [path for path in directory.iterdir() if EARLIER.fullmatch(path.name)]
    newest = directory / CHECKPOINT
    return [*([newest] if newest.exists() else []), *sorted(earlier, key=_step_of, reverse=True)]


def _step_of(path: Path) -> int:
    """Of an earlier checkpoint, by its name."""
    return int(path.stem.rpartition("-")[2])


def tail(path: Path, offset: int) -> str:
    """The last of the first `offset` bytes of a file, as hexadecimal digits, by which it is known to be the same."""
    with path.open("rb") as file:
        file.seek(max(0, offset - TAIL_BYTES))
        return file.read(min(offset, TAIL_BYTES)).hex()


def _check_types(path: Path, state: Mapping[str, Any]) -> None:
    """Raises DataError where a checkpoint lacks something that every run's has."""
    types: dict[str, dict[str, type]] = {
        "position": {"file": str, "offset": int, "tail": str},
        "run": KEPT,
    }
    missing = [
        f"{part}.{name}"
        for part, kinds in types.items()
        for name, kind in kinds.items()
        if not isinstance(state[part].get(name), kind)
    ]
    if missing:
        raise DataError(f"{printable(path, 200)} is no run's checkpoint: it has no {', '.join(missing)}")


def _check_position(directory: Path, path: Path, state: Mapping[str, Any]) -> None:
    """Raises DataError where the event files are not those that the checkpoint was saved beside."""
    position = state["position"]
    file = directory / position["file"]
    if file not in event_files(directory):
        raise DataError(f"{printable(path, 200)} is another run's: {printable(position['file'], 200)} is not there")
    offset = position["offset"]
    whole = offset <= file.stat().st_size and tail(file, offset) == position["tail"] and is_boundary(file, offset)
    if not whole:
        raise DataError(f"{printable(path, 200)} was saved beside another {file.name}: add --fork to go on without it")
