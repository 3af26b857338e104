"""The state of a run as files, from which it is resumed, evaluated and copied."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

from rlboard.checkpoint import BEST, CHECKPOINT, FORMAT, duplicate, remove, save, sha256_file
from rlboard.config import printable
from rlboard.errors import NumericalError
from rlboard.events import Event, Events
from rlboard.resume import checkpoints_of, tail
from rlboard.run import KEPT
from rlboard.seeding import random_states

if TYPE_CHECKING:
    from torch import nn

    from rlboard.run import Run

SHARE = 0.02
"""Of the time that may go into checkpoints; they come less often where one takes long."""


def checkpoints(events: Events, run: Run) -> Events:
    """Saves what decides the future every `--save-every` seconds and at the end, and the model at its best.

    It is the outermost instrument: what it saves is the state after all others have written. A disk that fails costs
    the checkpoint, not the run: the one before it is intact.

    Raises:
        NumericalError: the weights are NaN or infinite; the checkpoint before stays.
    """
    keeper = Keeper(run)
    for event in events:
        keeper.take(event)
        yield event
    keeper.save()


class Keeper:
    """The files of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model: nn.Module | None = None
        self.best: dict[str, Any] | None = None  # not yet saved
        self.event: Event | None = None  # not yet saved
        self.position: dict[str, Any] = {}
        self.saved_step = run.step
        self.presented_again = run.resumed
        self.due = time.monotonic() + run.options.save_every

    def take(self, event: Event) -> None:
        """Notes `event`, whose other instruments are done, and saves if it is time to."""
        self.model = event.model or self.model
        if self.presented_again:
            self.presented_again = False
            return  # it is where the run was resumed, and saved already
        self.event = event
        self.position = {"file": self.run.writer.events.path.name, "offset": self.run.writer.events.position}
        best = self.run.best.get(event.headline)
        if best and best["step"] == event.step and self.model is not None:
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.best = self._state(event, weights, None)
        if event.state and time.monotonic() >= self.due:
            self.save()

    def save(self) -> None:
        """Saves the last event, if it is not yet, and the best model."""
        if self.event is None or self.model is None or self.run.left:
            return
        began = time.monotonic()
        try:
            loop = self.event.state() if self.event.state else None
            weights = loop["model"] if loop else self.model.state_dict()
            if broken := [name for name, each in self.model.named_parameters() if not each.isfinite().all()]:
                where = f"{broken[0]} is NaN or infinite after step {self.event.step}"
                raise NumericalError(f"{where}: try a smaller --learning-rate")
            self._keep_earlier()
            self.run.writer.events.flush(sync=True)  # or a power cut leaves less than the position
            self.position["tail"] = tail(self.run.directory / self.position["file"], self.position["offset"])
            state = self._state(self.event, weights, loop)
            if self.best:  # first: what goes on from the checkpoint may never be so good again
                save(self.run.directory / BEST, self.best)
                self.best = None
            save(self.run.directory / CHECKPOINT, state)
            self.saved_step = self.event.step
        except OSError as error:
            self._complain(error)
        self.event = None
        cost = time.monotonic() - began
        every = self.run.options.save_every
        self.due = time.monotonic() + (max(every, cost / SHARE) if every else 0)

    def _state(self, event: Event, weights: dict[str, Any], loop: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "config": self.run.hyperparameters,
            "step": event.step,
            "model": weights,
            "loop": loop,
            "run": {name: getattr(self.run, name) for name in KEPT},
            "random": random_states() if loop else None,
            "position": self.position,
        }

    def _keep_earlier(self) -> None:
        """Gives the newest checkpoint its step as a second name, and removes those that are too many."""
        newest = self.run.directory / CHECKPOINT
        if self.run.options.keep > 1 and newest.exists() and sha256_file(newest).exists():
            duplicate(newest, newest.with_name(f"checkpoint-{self.saved_step}.pt"))
        for path in checkpoints_of(self.run.directory)[self.run.options.keep :]:
            remove(path)

    def _complain(self, error: OSError) -> None:
        failed = self.run.findings.get("failed_checkpoints", 0)
        self.run.findings["failed_checkpoints"] = failed + 1
        if not failed:
            reason = error.strerror or printable(error, 200)
            warnings.warn(f"no {CHECKPOINT} in {self.run.directory}: {reason}", RuntimeWarning, stacklevel=2)
