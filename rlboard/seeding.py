"""Equal seeds, equal runs."""

import os
import random

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
