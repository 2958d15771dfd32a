"""What a list of timings says."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Summary", "summarize"]


@dataclass(frozen=True)
class Summary:
    """Order statistics of timings, in their unit. Medians, because other work on the machine only ever adds time."""

    runs: int
    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a share of the median."""
        return (self.upper_quartile - self.lower_quartile) / self.median if self.median else 0.0


def summarize(samples: Sequence[float]) -> Summary:
    """The summary of one sample or more."""
    if not samples:
        raise ValueError("there is nothing to summarize: samples is empty")
    if len(samples) == 1:
        return Summary(1, samples[0], samples[0], samples[0], samples[0])
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(len(samples), median, lower, upper, min(samples))
