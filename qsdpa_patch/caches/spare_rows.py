"""Rows of a cache's buffers that nothing reads, so that a kernel may write them where they are."""

from __future__ import annotations

from qsdpa_patch.caches.packed_rows import Rows, capacity

__all__ = ["SpareRows"]


class SpareRows:
    """The rows of ``rows`` from ``first`` on: those after the last one that was ever stored in these arrays.

    ``rows`` are what MLX's own operations have just written to, so that no other array shares their memory: slices that
    were taken since hold stored rows, and those stay as they are. Copies of a cache may share its arrays, but not its
    spare rows (they are neither copied nor pickled): the copy's first new row goes into arrays of its own.
    """

    __slots__ = ("first", "rows", "stop")

    def __init__(self, rows: Rows, first: int) -> None:
        self.rows = rows
        self.first = first
        self.stop = capacity(rows)

    def hold(self, rows: Rows, start: int, stop: int) -> bool:
        """Whether rows ``start`` to ``stop`` of ``rows`` are spare."""
        return rows is self.rows and self.first <= start and stop <= self.stop
