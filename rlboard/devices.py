"""`--device auto|cpu|cuda|cuda:N|mps`: from the word on the command line to a device that is there."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from rlboard.config import printable
from rlboard.distributed import world
from rlboard.errors import UsageError

if TYPE_CHECKING:
    import torch


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h, in bytes: how much is kept at most, and the size from which on nothing is; the latter is
2^25 at most."""


def check_device(name: str) -> None:
    """Raises UsageError where `name` is no device's name; whether it is there is `resolve_device`'s question."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"--device {printable(name)} is not one of auto, cpu, cuda, cuda:0, mps")


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first of CUDA, MPS and the CPU that is there.

    Where torchrun has started several processes, each has a GPU of its own.

    Raises:
        UsageError: there is no such device on this machine, or too few for its processes.
    """
    import torch

    here = world()
    if here.size > 1:
        name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if name not in ("cpu", "cuda"):
            raise UsageError(f"--device {name}: {here.size} processes cannot share it: give cuda or cpu")
        if name == "cuda" and here.local_size > torch.cuda.device_count():
            seen = f"torch sees {torch.cuda.device_count()} CUDA devices for {here.local_size} processes"
            raise UsageError(f"--device cuda: {seen}: start one for each device, or give --device cpu")
        return torch.device(name, here.local_rank) if name == "cuda" else torch.device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices: use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch sees no Apple GPU here: use --device cpu")
    return device


def keep_freed_memory() -> None:
    """Has the C library keep memory that is freed for the next tensor, where it would give it back to the system.

    glibc gives large blocks back at once, and what it then gets in their place must be filled with zeros, page by page:
    a twentieth of the time of training on a CPU. The libraries of other systems decide for themselves.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(AttributeError):  # musl has nothing to set
        mallopt = ctypes.CDLL(None).mallopt
        for setting, value in (MMAP_THRESHOLD, 2**25), (TRIM_THRESHOLD, 2**31 - 1):
            mallopt(setting, value)


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
