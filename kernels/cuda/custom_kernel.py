"""Kernels of ``mx.fast.cuda_kernel``, as all of ours are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

__all__ = ["CustomKernel", "custom_kernel"]

CustomKernel = Callable[..., list[mx.array]]


def custom_kernel(
    name: str, inputs: Sequence[str], outputs: Sequence[str], body: str, header: str, shared_bytes: int = 0
) -> CustomKernel:
    """The kernel ``name``, compiled by MLX when a result of it is first evaluated. Inputs come with their strides."""
    kernel = mx.fast.cuda_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=body,
        header=header,
        ensure_row_contiguous=False,
        shared_memory=shared_bytes,
    )
    return cast(CustomKernel, kernel)
