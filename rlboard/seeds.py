"""Many seeds of one loop, side by side: a run for each, below a group whose own run says what they come to together.

A loop that leaves the interpreter free trains its seeds in threads of this process, any other in processes that share
the cores. Either way the run of a seed is what it would be alone on as many threads. When all have ended, their
headline is read back from their event files, and the group's run gets its mean and its interquartile mean over the
seeds, each with its 95 % interval.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlboard.config import Value
from rlboard.errors import OutOfMemoryError, RlboardError, UsageError, plain_warnings
from rlboard.eventfile import Series, read_scalars
from rlboard.events import Event, Events
from rlboard.instruments import INSTRUMENTS, Instrument
from rlboard.instruments.console import console
from rlboard.instruments.tabs import hyperparameters, scalars, text
from rlboard.layout import seed_bands
from rlboard.registry import Loop
from rlboard.resume import Resumption, prepare
from rlboard.run import Run, RunOptions, Stop, begin, memory_errors, open_run, pull, signals
from rlboard.runs.find import RUN_JSON
from rlboard.statistics import interquartile_mean, interval, mean

POLL_SECONDS = 0.1

Board = MutableSequence[int]
"""What the seeds and their group tell each other: the step of each seed, and last the signal that asks all to stop."""


@dataclass(frozen=True)
class Study:
    """What is the same for all seeds of a group; `given` are the options it is resumed with, None for a new one."""

    loop: Loop
    values: dict[str, Value]
    options: RunOptions
    command: list[str]
    given: dict[str, Value] | None = None

    @property
    def seeds(self) -> range:
        first = int(self.values["seed"])
        return range(first, first + self.options.seeds)

    def config(self, index: int) -> Any:
        return self.loop.load().Config(**self.values | {"seed": self.seeds[index]})

    def resumption(self, index: int, group: Path) -> Resumption | None:
        """What a seed goes on with, locked; None for one that begins. Raises what `resume.prepare` does."""
        directory = group / f"seed{self.seeds[index]}"
        if self.given is None or not (directory / RUN_JSON).exists():
            return None
        return prepare(self.loop, str(directory), group, self.given)


@dataclass(frozen=True)
class Trained:
    """A seed that has ended: by which tag it is judged, and all of that tag's points."""

    headline: str
    curve: Series


def execute_seeds(
    loop: Loop,
    values: dict[str, Value],
    options: RunOptions,
    command: list[str],
    resumption: Resumption | None = None,
    given: dict[str, Value] | None = None,
) -> int:
    """Runs `loop` with `options.seeds` seeds from `values["seed"]` on; returns the exit code, as `run.execute` does.

    With the `resumption` of a group, its seeds go on with the options `given`; those that are done stay as they are.

    Raises:
        RlboardError: what the loop refuses, before anything is written; or, at the end, what the first seed that failed
            has failed of.
    """
    study = Study(loop, values, options, command, given)
    if "seed" not in values:
        raise UsageError(f"--seeds: rlboard {loop.command} has no --seed: run it without --seeds")
    with memory_errors():
        config, stop = study.config(0), Stop()
        first = begin(loop, config)
        name = f"seeds{study.seeds[0]}-{study.seeds[-1]}"
        opened = open_run(loop, config, options, command, stop=stop, ending=name, resumption=resumption)
        with opened as group, signals(stop):
            group.findings["seeds"] = list(study.seeds)
            pull(train_seeds(study, group, first), group, (hyperparameters, text, scalars, console))
    return stop.exit_code


def train_seeds(study: Study, group: Run, first: Events) -> Events:
    """Trains all seeds; yields how far they are, a line for each that ends, and then the curves of all together.

    `first` are the events of the first seed. Raises RlboardError at the end, where seeds have failed.
    """
    opening = next(first)
    first, total = chain([opening], first), opening.total
    yield Event(0, total, notice=opening.notice)
    done: dict[int, Trained] = {}
    failed: dict[int, RlboardError] = {}
    executor, board, jobs = _threads(study, group, first) if opening.threads else _processes(study, group)
    with executor:
        waiting = {executor.submit(job): index for index, job in enumerate(jobs)}
        try:
            while waiting:
                ended, _ = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                messages = [_note(future, waiting.pop(future), study, done, failed) for future in ended]
                for message in messages or [""]:
                    yield Event(sum(board[:-1]) // len(study.seeds), total, message=message)
        finally:
            board[-1] = group.stop.number or signal.SIGTERM
            executor.shutdown(cancel_futures=True)
    if done:
        yield from bands([done[index] for index in sorted(done)], total, group, len(study.seeds))
    if failed:
        index, error = next(iter(failed.items()))
        rest = f" ({len(failed)} of {len(study.seeds)} seeds failed)" if len(failed) > 1 else ""
        raise type(error)(f"seed {study.seeds[index]}: {error}{rest}")


def _note(
    future: Future[Trained], index: int, study: Study, done: dict[int, Trained], failed: dict[int, RlboardError]
) -> str:
    """Sorts a seed that has ended into `done` or `failed`; returns a line about it."""
    count = f"({len(done) + len(failed) + 1} of {len(study.seeds)})"
    try:
        trained = done[index] = future.result()
    except RlboardError as error:
        failed[index] = error
        return f"seed {study.seeds[index]} failed: {error} {count}"
    except BrokenProcessPool:
        failed[index] = OutOfMemoryError("its process was killed; if memory ran out, train fewer seeds at a time")
        return f"seed {study.seeds[index]} failed: its process was killed {count}"
    return f"seed {study.seeds[index]}: {trained.headline} {trained.curve.value[-1]:.4g} at the end {count}"


def bands(trained: Sequence[Trained], total: int, group: Run, count: int) -> Events:
    """The headline of all seeds together, at every step that all have logged it."""
    headline = trained[0].headline
    curves = [each.curve for each in trained]
    steps = reduce(np.intersect1d, [curve.step for curve in curves])
    scores = np.array([curve.value[np.isin(curve.step, steps)] for curve in curves], np.float64)
    lower, upper = interval(scores, mean)
    iqm_lower, iqm_upper = interval(scores, interquartile_mean)
    columns = {
        f"{headline}/mean": mean(scores),
        f"{headline}/lower": lower,
        f"{headline}/upper": upper,
        f"{headline}/iqm": interquartile_mean(scores),
        f"{headline}/iqm_lower": iqm_lower,
        f"{headline}/iqm_upper": iqm_upper,
    }
    group.writer.add_custom_scalars(seed_bands(headline))
    for point, step in enumerate(steps[:-1]):
        yield Event(int(step), total, {tag: float(values[point]) for tag, values in columns.items()})
    final = {tag: float(values[-1]) for tag, values in columns.items()}
    group.findings["results"] = final
    notice = (
        f"{headline} at step {steps[-1]:,} over {len(trained)} of {count} seeds: mean {final[f'{headline}/mean']:.4g} "
        f"(95 % interval {lower[-1]:.4g} to {upper[-1]:.4g}), interquartile mean {final[f'{headline}/iqm']:.4g} "
        f"({iqm_lower[-1]:.4g} to {iqm_upper[-1]:.4g})"
    )
    yield Event(int(steps[-1]), total, final, f"{headline}/iqm", notice=notice)


Prepared = tuple[Executor, Board, Sequence[Callable[[], Trained]]]


def _threads(study: Study, group: Run, first: Events) -> Prepared:
    """Everything that is global, such as torch's generator, is used before the threads begin."""
    board: Board = [0] * (len(study.seeds) + 1)
    jobs = [_begun(study, group.directory, board, index, first) for index in range(len(study.seeds))]
    return ThreadPoolExecutor(_at_a_time(study)), board, jobs


def _begun(study: Study, group: Path, board: Board, index: int, first: Events | None = None) -> Callable[[], Trained]:
    """What trains a seed from its first event on, which has happened; `first` are the events of a new first seed."""
    resumption = study.resumption(index, group)
    if resumption and resumption.facts["status"] == "completed" and not resumption.changed:
        resumption.release()
        return partial(_trained, resumption.directory, next(iter(resumption.facts["best"])))
    events = first if first and not (index or resumption) else begin(study.loop, study.config(index), resumption)
    return partial(_train, study, group, board, index, events, resumption)


def _processes(study: Study, group: Run) -> Prepared:
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and half of its locks
    board = context.RawArray("q", len(study.seeds) + 1)
    jobs = [partial(_train_here, study, group.directory, index) for index in range(len(study.seeds))]
    workers = min(_at_a_time(study), len(study.seeds))
    executor = ProcessPoolExecutor(workers, context, _begin_process, (board, max(1, _cores() // workers)))
    return executor, board, jobs


def _at_a_time(study: Study) -> int:
    """How many seeds are trained side by side."""
    return study.options.jobs or _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_board: Board
"""Of a process that trains seeds; it cannot be sent with a job."""


def _begin_process(board: Board, threads: int) -> None:
    global _board
    _board = board
    torch.set_num_threads(threads)  # more than there are cores to share wait for each other, spinning
    plain_warnings()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the group asks on its board


def _train_here(study: Study, group: Path, index: int) -> Trained:
    with memory_errors():
        return _begun(study, group, _board, index)()


def _train(
    study: Study, group: Path, board: Board, index: int, events: Events, resumption: Resumption | None
) -> Trained:
    """The run of one seed."""

    def told(events: Events, run: Run) -> Events:
        for event in events:
            board[index] = event.step
            run.stop.number = run.stop.number or board[-1]
            yield event

    instruments: list[Instrument] = [each for each in INSTRUMENTS[study.options.log] if each is not console]
    config = study.config(index)
    opened = open_run(
        study.loop, config, study.options, study.command, stop=Stop(), group=str(group), resumption=resumption
    )
    with opened as run:
        pull(events, run, (*instruments, told))
    if not run.best:
        raise UsageError(f"--seeds: rlboard {study.loop.command} has no headline: there is nothing to compare seeds by")
    return _trained(run.directory, next(iter(run.best)))


def _trained(directory: Path, headline: str) -> Trained:
    return Trained(headline, read_scalars(directory, [headline])[headline])
