"""A run: its directory, its lock, its `run.json`, and the events pulled through the instruments.

This is the one room that names a directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import functools
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import rlboard
from rlboard import distributed
from rlboard.config import Value, option, printable
from rlboard.devices import keep_freed_memory
from rlboard.errors import DataError, OutOfMemoryError, StorageError, UsageError
from rlboard.files import replacing
from rlboard.registry import ROOT, Loop
from rlboard.runs.find import LOCK, RUN_JSON

if TYPE_CHECKING:
    from types import FrameType

    from filelock import BaseFileLock

    from rlboard.events import Events
    from rlboard.resume import Resumption
    from rlboard.writer import Writer

    Instrument = Callable[[Events, "Run"], Events]

SMALLEST_FREE_SPACE = 1 << 20  # bytes: less cannot hold a run's first second
RATES = {"time/steps": "time/fps", "time/images": "time/images_per_second"}
KEPT: dict[str, type] = {"best": dict, "work": dict, "drawn": dict, "melody": list}
"""What a run notes for itself, and takes over where it goes on."""
PATIENCE_SECONDS = 4.0
"""How long a run that is asked to stop waits for the event at hand, such as the end of an evaluation."""
LONGEST_NAME = 100  # characters; file systems take 255 bytes, and a letter can be 4


def check_run_name(name: str, flag: str = "--run-name") -> None:
    """Raises UsageError where `name` is not one plain directory name of letters, digits, `-`, `_`, `.`, `=`, `+`."""
    if name and (not re.fullmatch(r"[\w.=+-]+", name) or name.startswith(".") or len(name) > LONGEST_NAME):
        raise UsageError(
            f"{flag} {printable(name)} is not a plain name: use up to {LONGEST_NAME} letters, digits, "
            "'-', '_', '.', '=' or '+', without a leading '.'"
        )


def check_log_dir(name: str) -> None:
    """Raises UsageError where `name` is no path, StorageError where no run can be written below it."""
    if not name or "\0" in name:
        raise UsageError(f"--log-dir {printable(name)} is not a path: give a directory, such as --log-dir logs")
    root = Path(name)
    try:
        existing = next(path for path in (root, *root.absolute().parents) if path.exists())
        problem = (
            f"{printable(existing)} is a file: give a directory"
            if not existing.is_dir()
            else f"{printable(existing)} is not writable: give another directory"
            if not os.access(existing, os.W_OK | os.X_OK)
            else f"{printable(existing)} is on a full disk: free some space or give another directory"
            if shutil.disk_usage(existing).free < SMALLEST_FREE_SPACE
            else ""
        )
    except OSError as error:
        problem = f"{error.strerror}: give another directory"
    if problem:
        raise StorageError(f"--log-dir {printable(name)}: {problem}")


@dataclass(frozen=True)
class RunOptions:
    """The options of the plumbing, which every loop has beside those of its `Config`."""

    preset: str = option("", "other defaults")
    smoke: bool = option(False, "a run of seconds, to see that everything works")
    log_dir: str = option("logs", "root of all runs; what tensorboard --logdir is given",
                          check="rlboard.run:check_log_dir")  # fmt: skip
    run_name: str = option("", "name of the run's directory (default: start time and seed)",
                           check="rlboard.run:check_run_name")  # fmt: skip
    seeds: int = option(1, "independent runs, with the seeds from --seed on, side by side in one group", min=1)
    jobs: int = option(0, "of --seeds, how many are trained at a time; 0: as many as cores", min=0, max=1024)
    log: str = option("full", "minimal: scalars and hyperparameters; full: every tab",
                      choices=("minimal", "full"))  # fmt: skip
    capture_video: bool = option(False, "a GIF of an episode at every evaluation, in the Images tab and as a file")
    resume: str = option("", "go on with a run: last, the default, or its name, its directory or a checkpoint in it")
    fork: bool = option(False, "go on in a run of its own, with whichever options; what is resumed stays as it is")
    save_every: float = option(30.0, "seconds between checkpoints, more where they would take over 2 % of the time; "
                               "0: at every event", min=0)  # fmt: skip
    keep: int = option(2, "how many checkpoints are kept, beside the best model", min=1)
    profile: bool = option(False, "record where the time of a few steps goes, as figures, tables and traces")

    def __post_init__(self) -> None:
        if self.profile and self.seeds > 1:
            raise UsageError("--seeds and --profile do not go together: profile one seed")
        if self.jobs and self.seeds == 1 and not self.resume:
            raise UsageError(f"--jobs {self.jobs} is for several seeds: add --seeds N")


@dataclass
class Stop:
    """Who is asked to stop: all runs that share it.

    Attributes:
        number: the signal that asked, 0 for none yet.
        waiting: whether the loop is at work on its next event, and not an instrument on the one before.
    """

    number: int = 0
    waiting: bool = False

    @property
    def exit_code(self) -> int:
        return 128 + self.number if self.number else 0


@dataclass
class Run:
    """A run that is open: what the instruments are handed.

    Attributes:
        loop: which loop it runs, and `config` with what.
        options: the plumbing's own options.
        directory: where everything it writes lies.
        writer: the one writer of its event file.
        status: `running`, then `completed`, `interrupted`, `failed`, or `pruned` by a sweep.
        best: headline tag to its largest value so far and the step of it.
        weights_sha256: hash of the model's final weights; equal for equal runs.
        stop: whether the run is asked to stop.
        findings: more facts for `run.json`.
        resumed: whether it goes on in the directory of a run that was, from `step`.
        step: at which it begins.
        work: what was done by the last event, by the tag of `RATES`.
        drawn: the step at which an instrument that draws now and then last did, by its name.
        left: whether its loop was left within a step, so that what it has learned since its last event is no state.
        melody: the headline's curve, (step, value), as far as it is needed to play it.
    """

    loop: Loop
    config: Any
    options: RunOptions
    directory: Path
    writer: Writer
    command: list[str]
    started: float = field(default_factory=time.time)
    status: str = "running"
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    weights_sha256: str | None = None
    stop: Stop = field(default_factory=Stop)
    findings: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False
    step: int = 0
    work: dict[str, float] = field(default_factory=dict)
    drawn: dict[str, int] = field(default_factory=dict)
    left: bool = False
    melody: list[tuple[int, float]] = field(default_factory=list)
    began: float = field(default_factory=time.time)  # in this process

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """The resolved configuration: every field of the loop's `Config`."""
        return {spec.name: getattr(self.config, spec.name) for spec in dataclasses.fields(self.config)}

    def go_on(self, resumption: Resumption) -> None:
        """Takes over what the run that goes on has noted."""
        self.findings |= resumption.findings(_iso(self.began))
        self.step = resumption.step
        if resumption.state and not resumption.fork:
            for name in KEPT:
                setattr(self, name, resumption.state["run"][name])
            with contextlib.suppress(KeyError, TypeError, ValueError):
                self.started = datetime.datetime.fromisoformat(resumption.facts["started"]).timestamp()

    def record(self) -> None:
        """Writes `run.json`: an allow-list of facts, none of them from the environment, no home path.

        Raises:
            OSError: it cannot be written.
        """
        text = json.dumps(
            {
                "loop": f"{self.loop.track.package}/{self.loop.name}",
                "command": [part.replace(str(Path.home()), "~") for part in self.command],
                "config": self.hyperparameters,
                "seed": self.hyperparameters.get("seed"),
                "git_commit": _git_commit(),
                "versions": _versions(),
                "device": _device(str(self.hyperparameters.get("device", "cpu"))),
                "started": _iso(self.started),
                "ended": None if self.status == "running" else _iso(time.time()),
                "status": self.status,
                "best": self.best,
                "weights_sha256": self.weights_sha256,
                "dropped_records": self.writer.dropped,
                **self.findings,
            },
            indent=2,
            ensure_ascii=False,
        )
        with replacing(self.directory / RUN_JSON) as file:
            file.write(f"{text}\n".encode())


def execute(
    loop: Loop,
    values: dict[str, Value],
    options: RunOptions,
    command: list[str],
    instruments: Iterable[Instrument],
    resumption: Resumption | None = None,
) -> int:
    """Runs `loop` from its first event to its last, through `instruments`; returns the exit code.

    Args:
        loop: what to run.
        values: the resolved value of every option of the loop.
        options: where and how much to log.
        command: what the user typed, for `run.json`.
        instruments: what is done with the events, from the loop outwards.
        resumption: what is gone on with, if not a new run.

    Of several processes the first alone opens a run; the others take its events in step with it.

    Raises:
        RlboardError: see `rlboard.errors`; what was logged until then is on the disk.
    """
    config, here = loop.load().Config(**values), distributed.world()
    keep_freed_memory()
    with memory_errors():
        events = begin(loop, config, resumption)
        stop = asked = Stop()
        if here.size > 1:
            asked = Stop()
            events = distributed.in_step(events, asked, stop)
        if not here.leads:
            with signals(asked):
                for _ in events:
                    if stop.number:
                        break
            return stop.exit_code
        patience = PATIENCE_SECONDS if here.size == 1 else math.inf
        opened = open_run(loop, config, options, command, stop=stop, resumption=resumption)
        with opened as run, signals(asked, patience):
            pull(events, run, instruments)
    return stop.exit_code


def begin(loop: Loop, config: Any, resumption: Resumption | None = None) -> Events:
    """The events of `loop`, of which the first has happened: what it refuses is refused before anything is written.

    Raises:
        RlboardError: the loop refuses `config`, cannot use the checkpoint, or has nothing left to do.
    """
    import torch

    from rlboard.seeding import restore_random_states

    train = loop.load().train
    distributed.check_connected(loop.command)
    if resumption and "state" not in inspect.signature(train).parameters:
        raise UsageError(f"--resume: {loop.command} cannot be resumed: run it anew")
    state = resumption.state if resumption else None
    events: Events = train(config, state["loop"]) if state else train(config)
    try:
        first = next(events, None)
        if state:
            restore_random_states(state["random"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if not state or isinstance(error, torch.OutOfMemoryError) or distributed.is_silence(error):
            raise
        reason = f"{type(error).__name__}: {printable(error, 200)}"
        raise DataError(f"--resume: the checkpoint is not of this version of {loop.command}: {reason}") from None
    if first is None:
        raise UsageError(f"{loop.command} has nothing to do with these options")
    if resumption and state and first.step >= first.total and resumption.facts["status"] == "completed":
        raise UsageError(f"--resume: the run is complete, at step {first.step:,}: there is nothing left to do")
    return chain([first], events)


def pull(events: Events, run: Run, instruments: Iterable[Instrument]) -> None:
    """Pulls `events` through `instruments`, from the loop outwards, to the last one or until the run is to stop."""
    stream = _timed(_watch(events, run), run)
    if run.resumed:
        stream = _presented_again(stream, run)
    for instrument in instruments:
        stream = instrument(stream, run)
    for _ in stream:
        pass


def _presented_again(events: Events, run: Run) -> Events:
    """The events, until the second of which nothing is written: how a run begins has been logged."""
    from rlboard.writer import SilentWriter

    writer, run.writer = run.writer, cast("Writer", SilentWriter())
    drawn = dict(run.drawn)

    def stream() -> Events:
        try:
            yield next(events)
        finally:
            run.writer, run.drawn = writer, drawn
        yield from events

    return stream()


def _watch(events: Events, run: Run) -> Events:
    """Ends the events when a signal asks for it, so that every instrument finishes in order; notes how it went."""
    try:
        run.stop.waiting = True
        for event in events:
            run.stop.waiting = False
            yield event
            if run.stop.number:
                run.status = "interrupted"
                return
            run.stop.waiting = True
        run.stop.waiting = False
        run.status = "completed"
    except Interrupted:
        run.status, run.left = "interrupted", True
    except BaseException:
        run.status = "failed"
        raise


def _timed(events: Events, run: Run) -> Events:
    """Adds the work per second since the event before to events that say how much work was done."""
    moment = time.perf_counter()
    for event in events:
        for tag, rate in RATES.items():
            if tag in event.scalars:
                done, now = event.scalars[tag], time.perf_counter()
                per_second = (done - run.work.get(tag, 0.0)) / max(now - moment, 1e-9)
                event = dataclasses.replace(event, scalars={**event.scalars, rate: per_second})
                run.work[tag], moment = done, now
        yield event


@contextlib.contextmanager
def open_run(
    loop: Loop,
    config: Any,
    options: RunOptions,
    command: list[str],
    *,
    stop: Stop,
    ending: str = "",
    group: str = "",
    resumption: Resumption | None = None,
) -> Iterator[Run]:
    """Makes and locks the run directory and opens its writer; closes all of it, whatever happens in between.

    `ending`, the seed where it is empty, ends the directory's name, and is all of it in a `group`: the directory of
    several runs of which this is one.
    With a `resumption` it goes on in the directory of that, unless it is a fork.

    Raises:
        StorageError: the run cannot be written, or, at its end, not all of it could be.
    """
    from rlboard.writer import open_writer

    parent = Path(group) if group else directory_of(loop, options.log_dir)
    ending = ending or (f"seed{config.seed}" if hasattr(config, "seed") else "")
    name = ending if group else options.run_name or "-".join(filter(None, (time.strftime("%Y%m%d-%H%M%S"), ending)))
    try:
        if resumption and resumption.lock:
            directory, lock = resumption.directory, resumption.lock
            resumption.cut()
        else:
            directory, lock = _claim(parent, name)
        resumed = bool(resumption and resumption.state and not resumption.fork)
        writer = open_writer(directory, resumed=resumed)
        run = Run(loop, config, options, directory, writer, command, stop=stop, resumed=resumed)
        run.findings |= distributed.facts()
        if resumption:
            run.go_on(resumption)
        run.record()
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "give another --log-dir"
        raise StorageError(f"--log-dir {printable(options.log_dir)}: {error.strerror or error}: {hint}") from None
    try:
        yield run
    except BaseException:
        run.status = "failed"
        raise
    finally:
        writer.close()
        with contextlib.suppress(OSError):  # the writer has warned of a disk that fails
            run.record()
        lock.release()
    if (lost := writer.events.dropped) and not stop.number:
        raise StorageError(f"training is done, but {lost} records could not be written to {directory}")


def directory_of(loop: Loop, log_dir: str) -> Path:
    """Where all runs of `loop` lie."""
    return Path(log_dir) / loop.track.directory(loop.name)


def _claim(parent: Path, name: str) -> tuple[Path, BaseFileLock]:
    """A new directory `name` below `parent`, or `name-2`, `name-3`, …, and the lock that says that it is in use."""
    from filelock import FileLock

    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1_000_000):
        directory = parent / (name if number == 1 else f"{name}-{number}")
        try:
            directory.mkdir()  # fails where it exists: the file system decides between two processes
        except FileExistsError:
            continue
        lock = FileLock(directory / LOCK)
        lock.acquire(timeout=5)  # whoever looks whether it is held holds it for a moment
        return directory, lock
    raise FileExistsError(errno.EEXIST, f"every name from {name} to {name}-999999 is taken")


class Interrupted(BaseException):
    """Ends a loop from within, whose next event has not come in time: an evaluation, an episode without an end."""


@contextlib.contextmanager
def signals(stop: Stop, patience: float = math.inf) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP ends the runs after the event at hand, the second the process at once.

    Where an event does not come within `patience` seconds, the loop is left by Interrupted: what has been logged
    stays, and the run goes on from its last checkpoint.
    """

    def ask(number: int, _: FrameType | None) -> None:
        stop.number = number
        for each in previous:
            signal.signal(each, previous[each])
        if limited:
            signal.signal(signal.SIGALRM, leave)
            signal.setitimer(signal.ITIMER_REAL, patience, 0.5)  # again and again: an instrument is let finish

    def leave(_: int, __: FrameType | None) -> None:
        if stop.waiting:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Interrupted

    limited = patience < math.inf and hasattr(signal, "setitimer")
    watched = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in watched}
    try:
        for number in watched:
            signal.signal(number, ask)
    except ValueError:  # not in the main thread: its signals are not ours
        previous = {}
    try:
        yield
    finally:
        if limited and stop.number:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turns what torch and Python raise when memory runs out into `OutOfMemoryError`."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"out of memory: {printable(error, 200)}: try a smaller batch or network") from None


@functools.cache
def _git_commit() -> str | None:
    """The commit of the checkout that rlboard runs from, None where it is no checkout."""
    try:
        answer = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


@functools.cache
def _versions() -> dict[str, str]:
    packages = ("torch", "gymnasium", "numpy", "tensorboard")
    versions = {"python": platform.python_version(), "rlboard": rlboard.__version__}
    return versions | {name: metadata.version(name) for name in packages}


def _device(name: str) -> str:
    """`cpu, 2 cores` or `cuda:0, NVIDIA H200`: what the run ran on."""
    import torch

    from rlboard.devices import resolve_device

    device = resolve_device(name)
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {platform.machine()}, {os.cpu_count()} cores"


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
