"""Who runs what: a study's trials, shared by any number of processes on any number of machines.

A sweep of N trials has N slots, and each is one trial of Optuna's at a time. A process takes a waiting trial by setting
it running, which the storage lets only one of them do. A trial whose process died gives its slot back, and the next
one in it has the same parameters. Optuna has heartbeats of its own, but not for journals, and it loses the trials of
processes that die before their first beat or between a trial's end and its being queued again; here a slot without a
trial is simply filled, whatever has happened.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import optuna
from filelock import FileLock
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from rlboard.config import Value, printable
from rlboard.errors import UsageError
from rlboard.sweep.storage import answering, open_storage, sqlite_path

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

BEAT_SECONDS = 10.0
GRACE_SECONDS = 60.0
"""A trial that gives no sign of life for so long is taken for dead."""
MOST_KILLS = 3
"""How often the process of a trial may be killed before the trial counts as failed: it may be what kills it."""

SLOT, REASON, STOPPED, SPARE, BEAT = "slot", "reason", "stopped", "spare", "beat"


def is_vacated(trial: FrozenTrial) -> bool:
    """Whether it ended without a result and without a reason of its own: killed, or stopped by Ctrl-C."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs


@dataclass
class Slots:
    """What is in the slots at a moment: their trials, and how often one was killed in each.

    `spare` are trials that wait for a slot that another has, because two machines have queued it at once.
    """

    trials: dict[int, FrozenTrial] = field(default_factory=dict)
    kills: Counter[int] = field(default_factory=Counter)
    spare: list[FrozenTrial] = field(default_factory=list)

    def is_vacant(self, slot: int) -> bool:
        trial = self.trials.get(slot)
        return trial is None or (is_vacated(trial) and self.kills[slot] < MOST_KILLS)

    def finished(self) -> Iterator[tuple[int, FrozenTrial]]:
        """The trials that have ended and are not run again, by their slots."""
        for slot, trial in sorted(self.trials.items()):
            if trial.state.is_finished() and not self.is_vacant(slot):
                yield slot, trial


@dataclass
class Ledger:
    """A study, as one process sees it. Every method raises StorageError where the storage no longer answers.

    Attributes:
        address: of the storage.
        study: Optuna's.
        storage: of the study.
        is_new: whether this process made the study.
    """

    address: str
    study: optuna.Study
    storage: BaseStorage
    is_new: bool
    _seen: dict[int, tuple[Any, float]] = field(default_factory=dict)

    def slots(self) -> Slots:
        """What is in the slots now."""
        with answering(self.address):
            trials = self.study.get_trials(deepcopy=False)
        slots = Slots()
        for trial in trials:
            slot = trial.user_attrs.get(SLOT)
            if slot is None or SPARE in trial.user_attrs:
                continue
            if slot not in slots.trials or is_vacated(slots.trials[slot]):
                slots.trials[slot] = trial  # the first, for all alike: the storage numbers trials in order
            elif trial.state == TrialState.WAITING:
                slots.spare.append(trial)
            if is_vacated(trial) and STOPPED not in trial.user_attrs:
                slots.kills[slot] += 1
        return slots

    def queue(self, slot: int, parameters: Mapping[str, Value]) -> None:
        """Queues a trial for a slot; `parameters` are those that it does not choose itself."""
        with answering(self.address):
            self.study.enqueue_trial(dict(parameters), user_attrs={SLOT: slot})

    def claim(self, turn: int = 0) -> Trial | None:
        """A trial that no other process has or will get; None where none is waiting. Processes differ in `turn`."""
        path = sqlite_path(self.address)  # whose rows cannot be locked
        with answering(self.address), FileLock(f"{path}.lock") if path else contextlib.nullcontext():
            waiting = [trial for trial in self.slots().trials.values() if trial.state == TrialState.WAITING]
            waiting.sort(key=lambda trial: trial.number)
            begin = turn % max(1, len(waiting))  # or all processes ask for the same one
            for frozen in waiting[begin:] + waiting[:begin]:
                try:
                    if self.storage.set_trial_state_values(frozen._trial_id, TrialState.RUNNING):
                        return Trial(self.study, frozen._trial_id)
                except UpdateFinishedTrialError:
                    continue
        return None

    def tell(self, trial: Trial, state: TrialState, notes: Mapping[str, Any], value: float | None = None) -> bool:
        """Ends a running trial; False where another process has taken it for dead."""
        with answering(self.address):
            try:
                for name, note in notes.items():
                    trial.set_user_attr(name, note)
                self.study.tell(trial, value, state, skip_if_finished=True)
            except UpdateFinishedTrialError:
                return False
        return True

    def give_up(self, trial: int) -> None:
        """Ends the trial with the identifier `trial`, whose process is dead."""
        with answering(self.address), contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(trial, TrialState.FAIL)

    def bury(self, slots: Slots) -> None:
        """Ends what is spare, and the trials that have given no sign of life for too long, by this process' clock."""
        for trial in slots.spare:
            with answering(self.address), contextlib.suppress(UpdateFinishedTrialError):
                self.storage.set_trial_user_attr(trial._trial_id, SPARE, True)
                self.give_up(trial._trial_id)
        now = time.monotonic()
        last, self._seen = self._seen, {}
        for trial in slots.trials.values():
            if trial.state == TrialState.RUNNING:
                sign = trial.user_attrs.get(BEAT)
                before = last.get(trial._trial_id)
                self._seen[trial._trial_id] = before if before and before[0] == sign else (sign, now)
        for identifier, (_, since) in self._seen.items():
            if now - since > GRACE_SECONDS:
                self.give_up(identifier)

    @contextlib.contextmanager
    def alive(self, trial: int) -> Iterator[threading.Event]:
        """Gives signs of life of a running trial; the event that is yielded is set when it was taken for dead."""
        done, lost = threading.Event(), threading.Event()

        def beat() -> None:
            while not done.wait(BEAT_SECONDS):
                try:
                    self.storage.set_trial_user_attr(trial, BEAT, time.time())
                except UpdateFinishedTrialError:
                    lost.set()
                    return
                except Exception:  # noqa: BLE001 - a storage that fails for a moment; the trial's end will tell
                    continue

        thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield lost
        finally:
            done.set()
            thread.join()


def open_ledger(
    address: str, name: str, identity: Mapping[str, str], sampler: BaseSampler | None, pruner: BasePruner
) -> Ledger:
    """The study `name`, made where it is not there.

    `identity` is what a study may not change, by what it is called in the error message.

    Raises:
        UsageError: there is a study of that name that is another.
        StorageError: the storage does not answer.
    """
    storage = open_storage(address)
    chosen: dict[str, Any] = {"study_name": name, "storage": storage, "sampler": sampler, "pruner": pruner}
    with answering(address):
        try:
            study, is_new = optuna.create_study(**chosen, direction="maximize"), True
        except DuplicatedStudyError:
            study, is_new = optuna.load_study(**chosen), False
        known = study.user_attrs.get("sweep")
        if known is None:
            study.set_user_attr("sweep", dict(identity))
        elif known != identity:
            changed = next(key for key in identity if known.get(key) != identity[key])
            before, now = printable(known.get(changed), 100), printable(identity[changed], 100)
            raise UsageError(
                f"--study {printable(name)} is there with {changed} {before}, not {now}: give another --study"
            )
    return Ledger(address, study, storage, is_new)
