"""What went where: a count for every model type, layer kind, route and reason."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ROUTES", "Recorder", "Report", "ReportRow", "recorder"]

ROUTES = ("fused", "prefill", "ops", "stock")


@dataclass(frozen=True)
class ReportRow:
    """Calls that took one route for one reason.

    example: the shapes of the first such call, ``"q [1, 32, 1, 128] k [1, 8, 4096, 128] 4-bit g64"``.
    """

    model_type: str
    layer_kind: str
    route: str
    reason: str
    calls: int
    example: str


@dataclass(frozen=True)
class Report:
    """A snapshot of the counts since the patch was first enabled, or since ``reset_report()``.

    rows: one for each model type, layer kind, route and reason, most calls first within a model.
    notes: per ``(model type, layer kind)``, what was decided about caches: kept unquantized, padded, read as an array.
    """

    rows: tuple[ReportRow, ...] = ()
    notes: tuple[tuple[str, str, str], ...] = ()

    @property
    def calls(self) -> dict[str, int]:
        """Calls per route."""
        totals = dict.fromkeys(ROUTES, 0)
        for row in self.rows:
            totals[row.route] += row.calls
        return totals

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: ``{"calls": {route: n}, "rows": [...], "notes": [...]}``."""
        return {
            "calls": self.calls,
            "rows": [vars(row).copy() for row in self.rows],
            "notes": [{"model_type": m, "layer_kind": k, "note": n} for m, k, n in self.notes],
        }

    def __str__(self) -> str:
        if not self.rows and not self.notes:
            return "no attention calls yet"
        header = ("model", "layers", "route", "calls", "reason (example)")
        table = [header, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(4)]
        lines = [
            "  ".join((*(c.ljust(w) for c, w in zip(line[:3], widths)), line[3].rjust(widths[3]), line[4])).rstrip()
            for line in table
        ]
        lines += [f"{model} {kind}: {note}" for model, kind, note in self.notes]
        return "\n".join(lines)

    @staticmethod
    def _cells(row: ReportRow) -> tuple[str, str, str, str, str]:
        reason = row.reason if row.route != "fused" else ""
        example = f" ({row.example})" if reason and row.example else ""
        return row.model_type, row.layer_kind, row.route, str(row.calls), reason + example


@dataclass
class _Count:
    calls: int
    example: str


@dataclass
class Recorder:
    """Collects what :class:`Report` shows. Threads may record at once."""

    _counts: dict[tuple[str, str, str, str], _Count] = field(default_factory=dict)
    _notes: dict[tuple[str, str, str], None] = field(default_factory=dict)
    stock_calls: dict[str, int] = field(default_factory=dict)
    """Calls over unquantized caches, by module; written by the dispatcher, which has no time for more."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, model_type: str, layer_kind: str, route: str, reason: str, example: str) -> None:
        """Count a call."""
        if not self.count(model_type, layer_kind, route, reason):
            with self._lock:
                self._counts.setdefault((model_type, layer_kind, route, reason), _Count(0, example)).calls += 1

    def count(self, model_type: str, layer_kind: str, route: str, reason: str) -> bool:
        """Count a call, unless it is the first of its kind, which wants an example; whether it was counted."""
        with self._lock:
            count = self._counts.get((model_type, layer_kind, route, reason))
            if count is None:
                return False
            count.calls += 1
            return True

    def note(self, model_type: str, layer_kind: str, note: str) -> None:
        """Remember a decision about a kind of layer."""
        if (model_type, layer_kind, note) not in self._notes:
            with self._lock:
                self._notes[model_type, layer_kind, note] = None

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._counts.clear()
            self._notes.clear()
            self.stock_calls.clear()

    def report(self) -> Report:
        """A snapshot."""
        with self._lock:
            rows = sorted(self._rows(), key=lambda row: (row.model_type, row.layer_kind, -row.calls))
            return Report(tuple(rows), tuple(sorted(self._notes)))

    def _rows(self) -> Iterator[ReportRow]:
        for (model_type, kind, route, reason), count in self._counts.items():
            yield ReportRow(model_type, kind, route, reason, count.calls, count.example)
        for module, calls in self.stock_calls.items():
            model_type = module.removeprefix("mlx_lm.models.")
            yield ReportRow(model_type, "any", "stock", "not quantized", calls, "")


recorder = Recorder()
"""The process's recorder."""
