"""Rows of a cache's buffers that nothing reads, so that a kernel may write them where they are."""

from __future__ import annotations

from dataclasses import dataclass

from qsdpa_patch.caches.packed_rows import Rows

__all__ = ["SpareRows"]


@dataclass(slots=True)
class SpareRows:
    """Rows ``first`` to ``stop`` of buffers ``[batch, heads, ...]``: those after the last one ever stored in them.

    MLX's own operations have just written to the arrays, so that no others share their memory: slices that were taken
    since hold stored rows, and those stay as they are. Copies of a cache may share its arrays, but not its spare rows
    (they are neither copied nor pickled): the copy's first new row goes into arrays of its own.
    """

    batch: int
    heads: int  # of keys and values together
    first: int
    stop: int

    @classmethod
    def after(cls, first: int, rows: Rows) -> SpareRows:
        """Those of ``rows``, in which codes come first, from row ``first`` on."""
        batch, heads, stop, _ = rows[0].shape
        return cls(batch, heads, first, stop)

    def hold(self, batch: int, heads: int, start: int, stop: int) -> bool:
        """Whether there is room for rows ``start`` to ``stop`` of so many sequences and heads."""
        return self.first <= start and stop <= self.stop and batch == self.batch and heads == self.heads
