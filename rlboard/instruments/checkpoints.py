"""The trained model as a file, from which a finished run is read back."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from rlboard.checkpoint import CHECKPOINT, FORMAT, save
from rlboard.config import printable
from rlboard.events import Events

if TYPE_CHECKING:
    from rlboard.run import Run


def checkpoints(events: Events, run: Run) -> Events:
    """Saves the model as training leaves it. A disk that fails costs the checkpoint, not the run."""
    model, step = None, 0
    for event in events:
        model, step = event.model or model, event.step
        yield event
    if model is None:
        return
    state = {"format": FORMAT, "config": run.hyperparameters, "step": step, "model": model.state_dict()}
    try:
        save(run.directory / CHECKPOINT, state)
    except OSError as error:
        reason = error.strerror or printable(error, 200)
        warnings.warn(f"no {CHECKPOINT} in {run.directory}: {reason}", RuntimeWarning, stacklevel=2)
