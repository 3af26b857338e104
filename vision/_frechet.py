"""How far two sets of vectors lie apart: the Fréchet distance between the normal distributions fitted to them.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))

for means m and covariances C, in the squared unit of the vectors. Both roots are of symmetric matrices, and are taken
from eigenvalues in float64: no general matrix square root, whose result can be complex, and nothing added to the
diagonal, as a symmetric root exists for a singular covariance too. Eigenvalues that rounding has made negative count
as 0.

With Inception's features this is the "Fréchet Inception Distance"; with others it is not, and is not comparable with
it. A distance between two samples of one distribution is above 0, the more so the smaller they are: compare with that.

Sources: D. Dowson, B. Landau, "The Fréchet distance between multivariate normal distributions", 1982; M. Heusel et
al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017, arXiv:1706.08500.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """mean: (F,). covariance: (F, F). Both float64, on the CPU."""

    mean: Tensor
    covariance: Tensor


def fit(vectors: Tensor) -> Gaussian:
    """The normal distribution of `vectors`, (N, F), with N of 2 or more."""
    vectors = vectors.detach().cpu().double()
    return Gaussian(vectors.mean(dim=0), vectors.T.cov().reshape(vectors.shape[1], vectors.shape[1]))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """The squared Fréchet distance d^2 of two normal distributions, 0 or more."""
    eigenvalues, eigenvectors = torch.linalg.eigh(one.covariance)
    root = (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T
    product = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0)
    spread = one.covariance.trace() + other.covariance.trace() - 2 * product.sqrt().sum()
    squared: float = ((one.mean - other.mean).square().sum() + spread).item()
    return max(0.0, squared)


def mean_distance(vectors: Tensor) -> float:
    """The mean Euclidean distance between two different of `vectors`, (N, F)."""
    return torch.pdist(vectors.detach().cpu().double()).mean().item()
