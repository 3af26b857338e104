"""What several runs say together, and how surely.

R. Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", NeurIPS 2021: the mean is
swayed by single runs, the median throws most of them away; the interquartile mean is in between, and either comes with
a bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Statistic = Callable[[Scores], Scores]


def mean(scores: Scores) -> Scores:
    """The mean over the first axis: (runs, ...) to (...)."""
    return np.asarray(np.mean(scores, axis=0))


def interquartile_mean(scores: Scores) -> Scores:
    """The mean of the middle half of the runs, (runs, ...) to (...); a quarter, rounded down, goes at each end."""
    left_out = len(scores) // 4
    return mean(np.sort(scores, axis=0)[left_out : len(scores) - left_out])


def interval(
    scores: Scores, statistic: Statistic = mean, resamples: int = 2000, seed: int = 0
) -> tuple[Scores, Scores]:
    """The ends of the 95 % percentile bootstrap interval of `statistic` (Efron, 1979), each of its shape.

    Runs are drawn anew with replacement; in the stratified bootstrap of several tasks, within each task. What else the
    scores have as axes, such as the points of a curve, is drawn together. An equal `seed` gives an equal interval.
    """
    rng = np.random.default_rng(seed)
    runs = len(scores)
    drawn = [statistic(scores[rng.integers(runs, size=runs)]) for _ in range(resamples)]
    lower, upper = np.quantile(drawn, (0.025, 0.975), axis=0)
    return lower, upper
