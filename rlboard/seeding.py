"""Equal seeds, equal runs."""

import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, deterministic: bool = False) -> np.random.Generator:
    """Seeds Python, NumPy and torch (CPU and GPU), and returns a NumPy generator of the same seed.

    Two runs on one CPU with equal seeds are equal to the last bit. Between machines, and on a GPU, the order of
    floating-point sums differs, and so do the last digits; `deterministic` has torch use, on a GPU, only operators that
    always take the same order, or fail.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it for this
    if deterministic != torch.are_deterministic_algorithms_enabled():  # asking alone imports torch's compiler: 2 s
        torch.use_deterministic_algorithms(deterministic)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - environments may draw from the global generator
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's (CPU and GPU) global generators, as a checkpoint can hold them."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(numpy, dict)
    key = torch.from_numpy(numpy["state"]["key"])
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": key, "pos": numpy["state"]["pos"]}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Sets the global generators to what `random_states` has returned."""
    random.setstate(states["python"])
    numpy = states["numpy"]
    key = numpy["state"]["key"].numpy()
    np.random.set_state({**numpy, "state": {"key": key, "pos": numpy["state"]["pos"]}})  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
