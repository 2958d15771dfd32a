"""Rows of a cache's buffers that nothing reads, so that a kernel may write them where they are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SpareRows"]


@dataclass(slots=True)
class SpareRows:
    """Rows ``first`` to ``stop`` of buffers: those after the last one that was ever stored in these arrays.

    MLX's own operations have just written to the arrays, so that no others share their memory: slices that were taken
    since hold stored rows, and those stay as they are. Copies of a cache may share its arrays, but not its spare rows
    (they are neither copied nor pickled): the copy's first new row goes into arrays of its own.
    """

    first: int
    stop: int

    def hold(self, start: int, stop: int) -> bool:
        """Whether rows ``start`` to ``stop`` are spare."""
        return self.first <= start and stop <= self.stop
