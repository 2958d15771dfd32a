"""The CUDA kernel that quantizes new rows. See :mod:`qsdpa_patch.kernels.row_quantization`."""

from __future__ import annotations

from functools import cache

from qsdpa_patch.kernels.cuda.custom_kernel import custom_kernel
from qsdpa_patch.kernels.cuda.source import cuda_type, format_mode, headers
from qsdpa_patch.kernels.row_kernel import OUTPUTS, RowKernel, Rows, kernel_body

__all__ = ["THREAD", "row_kernel"]

THREAD = "blockIdx.x * blockDim.x + threadIdx.x"


@cache
def row_kernel(rows: Rows) -> RowKernel:
    """The kernel for ``rows``, compiled by MLX when a result of it is first evaluated."""
    body = kernel_body(rows, cuda_type(rows.dtype), format_mode(rows.format), THREAD)
    header = headers(("modes.cuh", "row_quantization.cuh"))
    return custom_kernel("qsdpa_quantize_rows", rows.inputs, OUTPUTS, f"using namespace qsdpa;\n{body}", header)
