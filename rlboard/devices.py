"""`--device auto|cpu|cuda|cuda:N|mps`: from the word on the command line to a device that is there."""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING

from rlboard.config import printable
from rlboard.errors import UsageError

if TYPE_CHECKING:
    import torch


def check_device(name: str) -> None:
    """Raises UsageError where `name` is no device's name; whether it is there is `resolve_device`'s question."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"--device {printable(name)} is not one of auto, cpu, cuda, cuda:0, mps")


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first of CUDA, MPS and the CPU that is there.

    Raises:
        UsageError: there is no such device on this machine.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices: use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch sees no Apple GPU here: use --device cpu")
    return device


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, in GB (2^30 bytes): by tensors on a CUDA device, else by the whole process.

    NaN where the system does not tell (Windows).
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
