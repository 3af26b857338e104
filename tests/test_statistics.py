"""What is said of several runs."""

from __future__ import annotations

import numpy as np
import pytest

from rlboard.statistics import interquartile_mean, interval, mean


@pytest.mark.parametrize(("scores", "expected"), [
    ([5.0], 5),
    ([1, 2, 9], 4),
    ([0, 1, 2, 100], 1.5),
    ([100, 0, 3, 2, 1, -50, 4, 5], 2.5),
    ([1, 2, 3, 4, 5, 6, 7], 4),
])  # fmt: skip
def test_interquartile_mean_leaves_out_a_quarter_at_each_end(scores: list[float], expected: float) -> None:
    assert interquartile_mean(np.array(scores, float)) == expected


def test_statistics_are_taken_point_by_point() -> None:
    scores = np.array([[1.0, 10], [3, 30], [5, 50], [700, 70]])
    assert mean(scores).tolist() == [177.25, 40]
    assert interquartile_mean(scores).tolist() == [4, 40]
    lower, upper = interval(scores, interquartile_mean)
    assert lower.shape == upper.shape == (2,)
    assert (lower <= [4, 40]).all()
    assert (upper >= [4, 40]).all()


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    scores = np.random.default_rng(0).normal(7, 2, 400)
    lower, upper = interval(scores)
    width = 1.96 * scores.std() / 20
    assert lower == pytest.approx(scores.mean() - width, abs=0.02)
    assert upper == pytest.approx(scores.mean() + width, abs=0.02)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 300 studies of 20 runs: the percentile bootstrap of so few is known to hold it a little less often."""
    rng = np.random.default_rng(1)
    studies = rng.normal(0, 1, (20, 300))
    lower, upper = interval(studies)
    held = ((lower < 0) & (upper > 0)).mean()
    assert 0.89 < held < 0.98


def test_equal_seeds_give_equal_intervals() -> None:
    scores = np.random.default_rng(0).normal(size=(10, 3))
    np.testing.assert_array_equal(interval(scores), interval(scores))
    assert (np.array(interval(scores)) != np.array(interval(scores, seed=1))).any()


def test_equal_scores_leave_no_doubt() -> None:
    assert np.array(interval(np.full(5, 500.0))).tolist() == [500, 500]
