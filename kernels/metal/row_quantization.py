"""The Metal kernel that quantizes new rows. See :mod:`qsdpa_patch.kernels.row_quantization`."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from qsdpa_patch.kernels.metal import backend, sources
from qsdpa_patch.kernels.row_kernel import OUTPUTS, RowKernel, Rows, kernel_body

__all__ = ["row_kernel"]

_TYPES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float"}


@cache
def row_kernel(rows: Rows) -> RowKernel:
    """The kernel for ``rows``, compiled by MLX when a result of it is first evaluated."""
    return backend.metal_kernel(
        name="qsdpa_quantize_rows",
        input_names=list(rows.inputs),
        output_names=list(OUTPUTS),
        header=sources.row_quantization_header(),
        source=kernel_body(rows, _TYPES[rows.dtype], sources.mode_of(rows.format), "thread_position_in_grid.x"),
        ensure_row_contiguous=False,
    )
