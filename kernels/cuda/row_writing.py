"""The CUDA kernel that quantizes rows straight into a cache's buffers. See :mod:`qsdpa_patch.kernels.row_writing`."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from qsdpa_patch.kernels.cuda.custom_kernel import CustomKernel
from qsdpa_patch.kernels.cuda.row_quantization import compiled
from qsdpa_patch.kernels.cuda.scales import repeated
from qsdpa_patch.kernels.cuda.source import cuda_type
from qsdpa_patch.kernels.pending_rows import RowWriter
from qsdpa_patch.kernels.row_kernel import OUTPUTS, Rows

__all__ = ["row_writer", "writing_kernel"]

_FIRST_ROW = "extent_shape[0] - {side}_shape[2]"


@cache
def writing_kernel(rows: Rows) -> CustomKernel:
    """The kernel for ``rows``, compiled by MLX when a result of it is first evaluated.

    It learns from the length of ``extent`` where the rows end in the buffers. MLX knows of none of its writes: its
    output, which nobody reads, stands for them, and so does ``after`` for those of an earlier call.
    """
    first = _FIRST_ROW.format(side=rows.inputs[0])
    types = "uint32_t", cuda_type(rows.dtype if rows.format.is_affine else mx.uint8)
    places = [
        f"Planes<{type}>{{const_cast<{type}*>({name}) + ({first}) * {name}_strides[2], "
        f"{name}_strides[0], {name}_strides[1], {name}_strides[2]}}"
        for name, type in zip(OUTPUTS, types)
    ]
    inputs = [*rows.inputs, *OUTPUTS, "extent", "after"]
    return compiled("qsdpa_write_rows", rows, inputs, ["written"], places)


def row_writer(rows: Rows, launch: dict[str, Any]) -> RowWriter:
    """Writes ``rows`` with a grid that fits their number."""
    kernel = writing_kernel(rows)
    arguments = {**launch, "output_shapes": [(1,)], "output_dtypes": [mx.uint32]}

    def write(sides: list[mx.array], buffers: list[mx.array], stop: int, after: mx.array | None) -> mx.array:
        codes, scales = buffers
        inputs = [*sides, codes, scales, repeated(0.0, stop), codes if after is None else after]
        return kernel(inputs=inputs, **arguments)[0]

    return write
