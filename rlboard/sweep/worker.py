"""One process of a sweep: it runs trial after trial, each a run of its own."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from optuna.trial import Trial, TrialState

from rlboard.config import Value
from rlboard.errors import NumericalError, RlboardError, StorageError, UsageError
from rlboard.events import Event, Events
from rlboard.instruments import INSTRUMENTS
from rlboard.instruments.console import console
from rlboard.resume import Resumption, prepare
from rlboard.run import Stop, begin, memory_errors, open_run, pull
from rlboard.runs.find import LOCK, RUN_JSON
from rlboard.sweep.ledger import REASON, SLOT, STOPPED, Ledger
from rlboard.sweep.plan import PARTS, Sweep
from rlboard.sweep.storage import answering

BEST, FINAL = "hparam/best", "hparam/final"

Board = MutableSequence[int]
"""What processes tell each other: 1 + the identifier of the trial of each, 0 for none, and last the signal to stop."""


class NoMetricError(UsageError):
    """What is to be searched is not logged, by no trial."""


@dataclass
class Watch:
    """What a trial has come to; `pruned` is the step at which it was found not worth going on."""

    sweep: Sweep
    trial: Trial
    metric: str
    best: float | None = None
    final: float | None = None
    pruned: int | None = None
    tags: set[str] = field(default_factory=set)
    part: int = 0

    def events(self, events: Events, asked: Callable[[], int], stop: Stop) -> Events:
        """The events with the metric's best and last value as scalars, until the trial is pruned."""
        for event in events:
            self.metric = self.metric or event.headline
            self.tags |= event.scalars.keys()
            worth_it = True
            if self.metric in event.scalars:
                value = self.final = float(event.scalars[self.metric])
                self.best = value if self.best is None or value > self.best else self.best
                event = replace(event, scalars={**event.scalars, BEST: self.best, FINAL: value})
                worth_it = self._is_worth_it(event, value)
            stop.number = stop.number or asked()
            yield event
            if not worth_it:
                self.pruned = event.step
                return

    def _is_worth_it(self, event: Event, value: float) -> bool:
        """Whether the trial should go on; asked once for each of its parts, as the storage takes its time."""
        part = PARTS * event.step // max(1, event.total)
        if self.sweep.pruner == "none" or part <= self.part or event.step >= event.total or not math.isfinite(value):
            return True
        self.part = part
        with answering(self.sweep.storage):
            self.trial.report(value, part)
            return not self.trial.should_prune()

    def findings(self, slot: int) -> dict[str, Any]:
        """The facts for `run.json`."""
        pruned = {} if self.pruned is None else {"pruned_at": self.pruned}
        known = {"metric": self.metric, "best": self.best, "final": self.final}
        return {"sweep": {"study": self.sweep.name, "trial": slot, **known, **pruned}}


class Worker:
    """Runs the trials that it can get.

    `board` is shared with the others of this machine, and `stop` asks for the end.
    """

    def __init__(self, sweep: Sweep, ledger: Ledger, index: int, board: Board, stop: Stop) -> None:
        self.sweep, self.ledger, self.index, self.board, self.stop = sweep, ledger, index, board, stop
        self.threads = max(1, _cores() // sweep.jobs)

    def run_next(self) -> bool:
        """Runs a trial that waits; returns whether there was one.

        Raises:
            StorageError: a run cannot be written, or the study's storage does not answer.
            NoMetricError: the loop does not log what is searched.
        """
        trial = self.ledger.claim(self.index)
        if trial is None:
            return False
        self.board[self.index] = trial._trial_id + 1
        self._run(trial)
        self.board[self.index] = 0
        return True

    def _run(self, trial: Trial) -> None:
        """Runs a trial and ends it; one that fails for a reason of its own is no end of the sweep."""
        slot = trial.user_attrs[SLOT]
        try:
            self.ledger.study.sampler = self.sweep.sampler(slot)
            with answering(self.sweep.storage):
                parameters = {dimension.name: dimension.suggest(trial) for dimension in self.sweep.space}
            with self.ledger.alive(trial._trial_id) as lost, memory_errors():
                watch, halted, directory = self._train(trial, slot, parameters, lost)
        except (StorageError, NoMetricError):
            self.ledger.tell(trial, TrialState.FAIL, {STOPPED: True})
            raise
        except RlboardError as error:
            self.ledger.tell(trial, TrialState.FAIL, {REASON: str(error), "exit_code": error.exit_code})
        except BaseException:
            self.ledger.tell(trial, TrialState.FAIL, {STOPPED: True})
            raise
        else:
            if halted:
                self.ledger.tell(trial, TrialState.FAIL, {STOPPED: True})
                return
            notes = {"metric": watch.metric, "best": watch.best, "final": watch.final, "run": directory.name}
            if watch.pruned is None:
                self.ledger.tell(trial, TrialState.COMPLETE, notes, watch.best)
            else:
                self.ledger.tell(trial, TrialState.PRUNED, notes)

    def _train(
        self, trial: Trial, slot: int, parameters: dict[str, Value], lost: threading.Event
    ) -> tuple[Watch, bool, Path]:
        """The run of a trial: what it came to, whether it was stopped before its end, and its directory.

        The run of a trial that was killed or stopped goes on from its checkpoint.
        """
        sweep, stop = self.sweep, Stop()
        torch.set_num_threads(self.threads)
        values = {**sweep.values, **parameters}
        watch = Watch(sweep, trial, sweep.metric)
        name = trial_name(slot)
        resumption = _earlier(sweep, Path(sweep.directory, name), values)
        known = resumption.facts.get("sweep", {}) if resumption else {}
        if resumption and known and resumption.facts["status"] in ("completed", "pruned") and resumption.state:
            resumption.release()  # all that was missing was to tell
            watch.metric, watch.best, watch.final = known["metric"], known["best"], known["final"]
            watch.pruned = known.get("pruned_at")
            return watch, False, resumption.directory
        if resumption and resumption.state:
            watch.best, watch.final = _until(resumption)
        try:
            config = sweep.loop.load().Config(**values)
            events = begin(sweep.loop, config, resumption if resumption and resumption.state else None)
        except BaseException:
            if resumption:
                resumption.release()
            raise

        def asked() -> int:
            return self.stop.number or self.board[-1] or (signal.SIGTERM if lost.is_set() else 0)

        instruments = [each for each in INSTRUMENTS[sweep.options.log] if each is not console]
        opened = open_run(
            sweep.loop,
            config,
            sweep.options,
            command_of(sweep, parameters),
            stop=stop,
            ending=name,
            group=sweep.directory,
            resumption=resumption,
        )
        with opened as run:
            try:
                pull(watch.events(events, asked, stop), run, instruments)
            finally:
                run.findings |= watch.findings(slot)
            if watch.pruned is not None:
                run.status = "pruned"
        halted = run.status == "interrupted"
        if not halted and watch.best is None:
            there = ", ".join(sorted(watch.tags)) or "nothing"
            missing = f"--metric {watch.metric}" if watch.metric else "--metric: the loop has no headline, and this"
            raise NoMetricError(f"{missing} is not logged by {sweep.loop.command}: give one of {there}")
        if not halted and not (math.isfinite(watch.best or 0) and math.isfinite(watch.final or 0)):
            raise NumericalError(f"{watch.metric} is {watch.best} at its best and {watch.final} at the end")
        return watch, halted, run.directory


def trial_name(slot: int) -> str:
    return f"trial{slot:03d}"


def command_of(sweep: Sweep, parameters: dict[str, Value]) -> list[str]:
    """What runs a trial alone."""
    options = {option.name: option for option in sweep.loop.options}
    chosen = {**sweep.fixed, **parameters}
    words = [options[name].spelled(value) for name, value in chosen.items() if name in options]
    words += [f"--preset={sweep.options.preset}"] if sweep.options.preset else []
    words += ["--smoke"] if sweep.options.smoke else []
    return ["rlboard", *filter(None, (sweep.loop.track.group, sweep.loop.command)), *words]


def _earlier(sweep: Sweep, directory: Path, values: dict[str, Value]) -> Resumption | None:
    """What is left of the trial's run, locked, to go on with or, without a state, to write anew; None for nothing."""
    if not (directory / RUN_JSON).exists():
        return None
    try:
        return prepare(sweep.loop, str(directory), Path(sweep.directory), values)
    except RlboardError:
        return overwriting(directory, values)


def overwriting(directory: Path, values: dict[str, Value]) -> Resumption | None:
    """A run's directory, locked, to write the run anew; None where there is none or another process writes to it."""
    if not directory.exists():
        return None
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=1)
    except (Timeout, OSError):
        return None
    return Resumption(directory, {}, values, {}, None, None, fork=False, lock=lock)


def _until(resumption: Resumption) -> tuple[float | None, float | None]:
    """The best and the last value of the metric until where a run goes on."""
    from rlboard.eventfile import read_scalars

    series = read_scalars(resumption.directory, [BEST, FINAL])
    values = {tag: series[tag].value[series[tag].step <= resumption.step] for tag in (BEST, FINAL) if tag in series}
    best, final = (float(values[tag][-1]) if len(values.get(tag, ())) else None for tag in (BEST, FINAL))
    return best, final


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
