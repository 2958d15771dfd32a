"""The CUDA kernel that quantizes new rows. See :mod:`qsdpa_patch.kernels.row_quantization`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from qsdpa_patch.kernels.cuda.custom_kernel import CustomKernel, custom_kernel
from qsdpa_patch.kernels.cuda.source import cuda_type, format_mode, headers
from qsdpa_patch.kernels.row_kernel import OUTPUTS, RowKernel, Rows, kernel_body

__all__ = ["compiled", "row_kernel"]

_THREAD = "blockIdx.x * blockDim.x + threadIdx.x"


@cache
def row_kernel(rows: Rows) -> RowKernel:
    """The kernel for ``rows``, compiled by MLX when a result of it is first evaluated."""
    return compiled("qsdpa_quantize_rows", rows, rows.inputs, OUTPUTS, OUTPUTS)


def compiled(
    name: str, rows: Rows, inputs: Sequence[str], outputs: Sequence[str], places: Sequence[str]
) -> CustomKernel:
    """The kernel ``name``, which quantizes ``rows`` to ``places``: where codes and scales go, in CUDA."""
    body = kernel_body(rows, cuda_type(rows.dtype), format_mode(rows.format), _THREAD, places)
    header = headers(("modes.cuh", "row_quantization.cuh"))
    return custom_kernel(name, inputs, outputs, f"using namespace qsdpa;\n{body}", header)
