"""The results of a benchmark run, and their form as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from qsdpa_patch.bench.cases import Case
from qsdpa_patch.bench.limits import DeviceLimits
from qsdpa_patch.bench.measurement import OURS, Measurement
from qsdpa_patch.bench.statistics import Summary, summarize

__all__ = ["SCHEMA", "BenchmarkRun", "CaseResult", "PathResult"]

SCHEMA = 1
"""Version of what :meth:`BenchmarkRun.to_dict` gives."""


@dataclass(frozen=True)
class PathResult:
    """A measurement and what follows from it; ``summary`` is missing where the path failed, ``host`` on the CPU.

    slower_than_ours: its median as a multiple of ours, where both are there.
    """

    measurement: Measurement
    summary: Summary | None
    host: Summary | None
    slower_than_ours: float | None

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes of keys and values over the median time."""
        work = self.measurement.work
        return work.nbytes / self.summary.median if work and self.summary else None

    def of_limit(self, limits: DeviceLimits) -> float | None:
        """The least time that the device could take over the median time: 1 is as fast as can be."""
        work = self.measurement.work
        return limits.seconds(work) / self.summary.median if work and self.summary else None

    def to_dict(self, limits: DeviceLimits) -> dict[str, Any]:
        """As plain data, every sample included."""
        measurement, summary, work = self.measurement, self.summary, self.measurement.work
        data: dict[str, Any] = {
            "name": measurement.name,
            "error": measurement.error or None,
            "route": measurement.route or None,
            "reason": measurement.reason or None,
            "difference": measurement.difference,
            "calls_per_run": measurement.calls_per_run,
            "seconds_per_call": measurement.samples,
            "host_seconds_per_call": measurement.host_samples,
            "peak_bytes": measurement.peak_bytes,
            "bytes_read": work.nbytes if work else None,
            "multiply_adds": work.multiply_adds if work else None,
        }
        if summary is not None:
            data["median"] = summary.median
            data["lower_quartile"], data["upper_quartile"] = summary.lower_quartile, summary.upper_quartile
            data["minimum"] = summary.minimum
            data["slower_than_ours"] = self.slower_than_ours
            data["bytes_per_second"] = self.bytes_per_second
            data["of_limit"] = self.of_limit(limits)
        return data


@dataclass(frozen=True)
class CaseResult:
    """All paths of a case."""

    case: Case
    paths: list[PathResult]

    @classmethod
    def of(cls, case: Case, measurements: Sequence[Measurement]) -> CaseResult:
        summaries = {m.name: summarize(m.samples) if m.samples else None for m in measurements}
        ours = summaries.get(OURS)
        paths = []
        for measurement in measurements:
            summary = summaries[measurement.name]
            ratio = summary.median / ours.median if summary and ours and measurement.name != OURS else None
            host = summarize(measurement.host_samples) if measurement.host_samples else None
            paths.append(PathResult(measurement, summary, host, ratio))
        return cls(case, paths)


@dataclass
class BenchmarkRun:
    """Everything that one command measured."""

    machine: dict[str, Any]
    limits: DeviceLimits
    command: str
    results: list[CaseResult] = field(default_factory=list)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "started": self.started.isoformat(timespec="seconds"),
            "machine": self.machine,
            "limits": asdict(self.limits),
            "results": [
                {**result.case.to_dict(), "paths": [path.to_dict(self.limits) for path in result.paths]}
                for result in self.results
            ],
        }
