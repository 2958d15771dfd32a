"""New rows quantized straight into the buffers of a cache, where a device's kernel can.

MLX's arrays never change. What is written to a part of one is a new array: in the same memory where nothing else holds
it, and in a copy of all of it otherwise. A kernel under way holds what it reads, so while the host is ahead of a GPU
each step would copy what the step before attends to. A kernel of our own may write to its inputs, at rows that nothing
was ever promised about (:class:`~qsdpa_patch.caches.spare_rows.SpareRows`). MLX orders kernels by their outputs, so it
has one that stands for the writes, a token: whoever reads the rows takes it as an input, or waits for it first
(:class:`~qsdpa_patch.kernels.pending_rows.PendingRows`). Where the kernel that attends to the rows stores them itself,
the one here never runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import cast

import mlx.core as mx

from qsdpa_patch.kernels.backends import default_backend_name
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.pending_rows import PendingRows, RowWriter
from qsdpa_patch.kernels.row_kernel import Rows, can_rotate, launch, thread_count
from qsdpa_patch.kernels.row_quantization import bytes_apart, check_rows, quantize_rows_in_ops, sample_rows, tried_out

__all__ = ["can_write_rows", "row_writer"]


def row_writer(sides: Sequence[mx.array], format: Format) -> RowWriter | None:
    """What writes rows of these shapes and dtypes in ``format``; ``None`` where no kernel of the default device can.

    Raises:
        TypeError, ValueError: when the sides do not fit each other or ``format``.
    """
    return _plan(format, default_backend_name(), *[x.dtype for x in sides], *[x.shape for x in sides])


@lru_cache(maxsize=1024)
def _plan(format: Format, backend: str, *described: mx.Dtype | tuple[int, ...]) -> RowWriter | None:
    """What writes rows of these dtypes, which come first, and shapes."""
    sides = len(described) // 2
    dtypes, shapes = cast(tuple[mx.Dtype, ...], described[:sides]), cast(tuple[tuple[int, ...], ...], described[sides:])
    check_rows(format, dtypes, shapes)
    batch, _, count, dim = shapes[0]
    rows = Rows(format, dtypes[0], dim, sides)
    threads = thread_count(rows, batch, sum(shape[1] for shape in shapes), count)
    return _writer(backend, rows, threads) if 0 < threads < 1 << 31 and can_write_rows(backend, rows)[0] else None


@cache
def can_write_rows(backend: str, rows: Rows) -> tuple[bool, str]:
    """Whether a kernel of ``backend`` writes ``rows``, and if not, why.

    The first time it is compiled and held against MLX's own operations, bit for bit. A kernel that fails is logged,
    and not used.
    """
    if backend != "cuda":
        return False, f"there is no kernel that writes rows into buffers on {backend}"
    if reason := _unfit(rows):
        return False, reason
    return tried_out(backend, rows, "the kernel that writes rows into buffers", _bytes_wrong)


def _unfit(rows: Rows) -> str:
    """Why the kernel has no way to quantize ``rows`` alone; empty if it has."""
    if rows.format.symmetric:
        return "symmetric formats are quantized in MLX's own operations"
    if rows.format.rotated and not can_rotate(rows.dim):
        return f"rows of {rows.dim} numbers are rotated in MLX's own operations"
    return ""


def _bytes_wrong(backend: str, rows: Rows) -> int:
    """Bytes that the kernel leaves unlike MLX's operations, when it writes twice into the same buffers."""
    sides = sample_rows(rows)
    batch, heads, count, _ = sides[0].shape
    write = _writer(backend, rows, thread_count(rows, batch, heads * len(sides), count))
    new = quantize_rows_in_ops(sides, rows.format)
    buffers = [mx.ones((*x.shape[:2], 3 * count, x.shape[3]), x.dtype) for x in new]
    wanted = [mx.concatenate([mx.ones_like(x), x, x], axis=2) for x in new]
    mx.eval(buffers, wanted)
    before = PendingRows(sides, write, buffers, 2 * count, None)
    actual = PendingRows(sides, write, buffers, 3 * count, before.token).then(buffers)
    return bytes_apart(actual, wanted)


def _writer(backend: str, rows: Rows, threads: int) -> RowWriter:
    module = importlib.import_module(f"qsdpa_patch.kernels.{backend}.row_writing")
    return cast(RowWriter, module.row_writer(rows, launch(threads)))
