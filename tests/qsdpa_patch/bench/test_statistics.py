"""Summaries of timings."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qsdpa_patch.bench.statistics import summarize


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 101])
def test_as_numpy(count: int) -> None:
    samples = [random.Random(count * 1000 + i).expovariate(1) for i in range(count)]
    summary = summarize(samples)
    assert (summary.lower_quartile, summary.median, summary.upper_quartile) == pytest.approx(
        np.percentile(samples, (25, 50, 75)).tolist()
    )
    assert summary.runs == count
    assert summary.minimum == min(samples)
    assert summary.spread == pytest.approx((summary.upper_quartile - summary.lower_quartile) / summary.median)


def test_one_outlier_moves_neither_median_nor_quartiles() -> None:
    assert summarize([1.0] * 9 + [100.0]).median == summarize([1.0] * 10).upper_quartile == 1.0


def test_one_sample() -> None:
    summary = summarize([2.0])
    assert (summary.runs, summary.median, summary.minimum, summary.spread) == (1, 2.0, 2.0, 0.0)


def test_none() -> None:
    with pytest.raises(ValueError, match="empty"):
        summarize([])
