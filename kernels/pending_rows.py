"""Rows of a cache that a kernel has still to write, unknown to MLX. See :mod:`qsdpa_patch.kernels.row_writing`."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

__all__ = ["PendingRows", "RowWriter"]

RowWriter = Callable[[list[mx.array], list[mx.array], int, mx.array | None], mx.array]
"""``write(sides, buffers, stop, after)`` quantizes ``sides`` into the rows of ``buffers`` that end before ``stop``.

sides, and codes and scales as ``buffers``: as :func:`~qsdpa_patch.kernels.row_quantization.quantize_rows` takes and
gives them, buffers contiguous along their last axis. after: what stands for earlier writes into the same buffers. Gives
what stands for these: a lazy array of which only the graph matters.
"""

_start: Callable[[mx.array], None] = mx.async_eval
"""Evaluate an array without waiting for it."""


class PendingRows:
    """The last rows of buffers, which a kernel has still to write: the one that attends to them, or one of its own.

    Args:
        sides: the new rows.
        write, buffers, stop, after: the kernel of its own, and its other arguments (:data:`RowWriter`).

    Attributes:
        count: how many rows are new.
        sides: the new rows, for a kernel that stores them and then says so to :meth:`stored`; ``None`` where one does.
        after: what stands for earlier writes, until these are on their way.
        awaited: whether operations of MLX needed the rows.
    """

    __slots__ = ("_buffers", "_stop", "_token", "_write", "after", "awaited", "count", "sides")

    def __init__(
        self, sides: list[mx.array], write: RowWriter, buffers: list[mx.array], stop: int, after: mx.array | None
    ) -> None:
        self.sides: list[mx.array] | None = sides
        self._write = write
        self._buffers = buffers
        self._stop = stop
        self._token: mx.array | None = None
        self.after = after
        self.awaited = False
        self.count = sides[0].shape[2]

    def stored(self, token: mx.array) -> None:
        """A kernel stores the rows; ``token``, an output of it, stands for that."""
        self._token, self.sides, self.after = token, None, None

    @property
    def token(self) -> mx.array:
        """What stands for the writes."""
        if self.sides is not None:
            self.stored(self._write(self.sides, self._buffers, self._stop, self.after))
        assert self._token is not None
        return self._token

    def then(self, buffers: list[mx.array]) -> list[mx.array]:
        """``buffers`` for any operation: arrays that are there once the rows are.

        Within one evaluation MLX orders CUDA kernels by the memory that they say they write, which is not that of
        ``buffers``. So the kernel that writes is on its way when this returns, ahead of all that is evaluated later.
        """
        self.awaited = True
        _start(self.token)
        codes, scales = mx.depends(buffers, [self.token])
        return [codes, scales]
