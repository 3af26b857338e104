"""The hash of the final weights, by which two runs are known to be equal."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from rlboard.events import Events

if TYPE_CHECKING:
    from torch import nn

    from rlboard.run import Run


def weights(events: Events, run: Run) -> Events:
    """Notes the hash of the last event's model in `run.json`."""
    model = None
    for event in events:
        model = event.model or model
        yield event
    if model is not None:
        run.weights_sha256 = weights_sha256(model)


def weights_sha256(model: nn.Module) -> str:
    """A hash of the names, types, shapes and values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
