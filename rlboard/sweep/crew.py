"""The processes of a sweep on this machine, and how far all machines together are."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import MutableSequence
from multiprocessing import connection
from typing import Protocol

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from rlboard.config import printable
from rlboard.errors import OutOfMemoryError, RlboardError, plain_warnings
from rlboard.instruments.console import progress_bar
from rlboard.run import Stop
from rlboard.sweep.ledger import MOST_KILLS, REASON, Ledger
from rlboard.sweep.plan import Sweep
from rlboard.sweep.storage import check_installed

POLL_SECONDS = 0.5
IDLE_SECONDS = 0.2
QUEUED = 64
"""Trials that wait, at most: a database reads all of them anew, again and again."""


class Crew(Protocol):
    """Who runs the trials."""

    def wait(self) -> None:
        """Returns after a moment, or after a trial. Raises what ended one of the crew."""

    def end(self) -> None:
        """Has all finish the step at hand."""


class Alone:
    """This process runs the trials itself, which spares a machine the start of another."""

    def __init__(self, sweep: Sweep, ledger: Ledger, stop: Stop) -> None:
        from rlboard.sweep.worker import Worker  # with torch; it takes long to import where others run the trials

        self.worker = Worker(sweep, ledger, 0, [0, 0], stop)

    def wait(self) -> None:
        if not self.worker.run_next():
            time.sleep(IDLE_SECONDS)

    def end(self) -> None: ...


class Processes:
    """Processes that live as long as the sweep; one that is killed is replaced, and its trial is run again."""

    def __init__(self, sweep: Sweep, ledger: Ledger, stop: Stop) -> None:
        self.sweep, self.ledger, self.stop = sweep, ledger, stop
        self.context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and half of its locks
        self.board: MutableSequence[int] = self.context.RawArray("q", sweep.jobs + 1)
        self.futile = 0
        self.members = [self._begin(index) for index in range(sweep.jobs)]

    def _begin(self, index: int) -> tuple[multiprocessing.process.BaseProcess, connection.Connection]:
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=live, args=(self.sweep, index, self.board, theirs))
        process.start()
        theirs.close()
        return process, ours

    def wait(self) -> None:
        connection.wait([process.sentinel for process, _ in self.members], POLL_SECONDS)
        for index, (process, errors) in enumerate(self.members):
            if process.is_alive():
                continue
            process.join()
            self._raise(errors)
            trial, self.board[index] = self.board[index] - 1, 0
            if trial >= 0:
                self.ledger.give_up(trial)
            self.futile = self.futile + 1 if trial < 0 else 0
            if self.futile > MOST_KILLS * self.sweep.jobs:
                raise OutOfMemoryError("processes are killed as they start: if memory runs out, give fewer --jobs")
            self.members[index] = self._begin(index)

    def end(self) -> None:
        self.board[-1] = self.stop.number or signal.SIGTERM
        try:
            for process, errors in self.members:
                process.join()
                self._raise(errors)
        finally:
            for process, _ in self.members:
                process.terminate()

    def _raise(self, errors: connection.Connection) -> None:
        """Raises what a process that has ended has sent."""
        try:
            error = errors.recv() if errors.poll() else None
        except EOFError:
            return  # killed
        if isinstance(error, RlboardError):
            raise error
        if error:
            raise RuntimeError(f"in a process of the sweep:\n{error}")


def live(sweep: Sweep, index: int, board: MutableSequence[int], errors: connection.Connection) -> None:
    """The life of a process of its own: trial after trial, until it is asked to stop or its parent is dead.

    What ends it before goes to `errors`: an RlboardError, or the traceback of a mistake of ours.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent asks on the board
    plain_warnings()
    stop = Stop()

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            stop.number = signal.SIGTERM

    threading.Thread(target=follow, daemon=True).start()
    try:
        from rlboard.sweep.worker import Worker

        check_installed()
        worker = Worker(sweep, sweep.open(), index, board, stop)
        while not (stop.number or board[-1]):
            if not worker.run_next():
                time.sleep(IDLE_SECONDS)
    except RlboardError as error:
        errors.send(error)
    except Exception:  # noqa: BLE001 - the parent raises it
        errors.send(traceback.format_exc())


def supervise(sweep: Sweep, ledger: Ledger, stop: Stop, terminal: Console) -> None:
    """Has all trials run, whoever runs them, and returns when all have ended or the sweep is asked to stop.

    Raises:
        StorageError: the storage does not answer, or a run cannot be written.
        UsageError: the loop does not log what is searched.
    """
    announced = dict(ledger.slots().finished())
    if not ledger.is_new:
        terminal.print(f"going on with the study: {len(announced):,} of {sweep.trials:,} trials are done", markup=False)
    progress = progress_bar(terminal)
    crew: Crew = Alone(sweep, ledger, stop) if sweep.jobs == 1 else Processes(sweep, ledger, stop)
    with progress:
        task = progress.add_task("starting", total=sweep.trials)
        leads, starved = ledger.is_new, 0
        try:
            while True:
                slots = ledger.slots()
                finished = dict(slots.finished())
                for slot in sorted(finished.keys() - announced.keys()):
                    announced[slot] = finished[slot]
                    if finished[slot].state == TrialState.FAIL or not terminal.is_terminal:
                        line = described(slot, finished[slot])
                        terminal.print(f"{line} ({len(announced):,} of {sweep.trials:,})", markup=False)
                        terminal.file.flush()
                progress.update(task, completed=len(finished), description=_best(finished))
                if stop.number or all(slot in finished for slot in range(sweep.trials)):
                    break
                ledger.bury(slots)
                vacant = [slot for slot in range(sweep.trials) if slots.is_vacant(slot)]
                waiting = sum(trial.state == TrialState.WAITING for trial in slots.trials.values())
                starved = 0 if waiting or not vacant else starved + 1
                leads = leads or starved > 1  # whoever has led so far does no more
                for slot in vacant[: max(0, QUEUED - waiting)] if leads else ():
                    left = slots.trials.get(slot)
                    ledger.queue(slot, left.params if left else sweep.grid(slot))
                crew.wait()
        finally:
            crew.end()


def described(slot: int, trial: FrozenTrial) -> str:
    """A trial that has ended, in a line."""
    parameters = " ".join(f"{name}={short(value)}" for name, value in trial.params.items())
    if trial.state == TrialState.FAIL:
        return f"trial {slot} failed: {printable(reason(trial), 200)}; {parameters}"
    notes = trial.user_attrs
    pruned = "pruned, " if trial.state == TrialState.PRUNED else ""
    return f"trial {slot}: {pruned}{notes['metric']} {notes['final']:.4g}, best {notes['best']:.4g}; {parameters}"


def reason(trial: FrozenTrial) -> str:
    """Why a trial failed."""
    return str(trial.user_attrs.get(REASON) or f"its process was killed {MOST_KILLS} times")


def short(value: object) -> str:
    """A parameter for people; what is run has all of its digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _best(finished: dict[int, FrozenTrial]) -> str:
    complete = [(trial.value or 0.0, -slot) for slot, trial in finished.items() if trial.state == TrialState.COMPLETE]
    if not complete:
        return "no result yet"
    value, slot = max(complete)
    return f"best {finished[-slot].user_attrs['metric']} {value:.4g} in trial {-slot}"
