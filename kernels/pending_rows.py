"""Rows of a cache that a kernel may still have to write, unknown to MLX. See :mod:`qsdpa_patch.kernels.row_writing`."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

__all__ = ["PendingRows"]

_start: Callable[[mx.array], None] = mx.async_eval
"""Evaluate an array without waiting for it."""


class PendingRows:
    """The last rows of buffers, which a kernel may still have to write.

    token: what a :data:`~qsdpa_patch.kernels.row_writing.RowWriter` gave. count: how many rows it writes.
    awaited: whether anything but kernels that take the token needed the rows.
    """

    __slots__ = ("awaited", "count", "token")

    def __init__(self, token: mx.array, count: int) -> None:
        self.token = token
        self.count = count
        self.awaited = False

    def then(self, buffers: list[mx.array]) -> list[mx.array]:
        """``buffers`` for any operation: arrays that are there once the rows are.

        Within one evaluation MLX orders CUDA kernels by the memory that they say they write, which is not that of
        ``buffers``. So the kernel that writes is on its way when this returns, ahead of all that is evaluated later.
        """
        self.awaited = True
        _start(self.token)
        codes, scales = mx.depends(buffers, [self.token])
        return [codes, scales]
