"""Rotation of rows before quantization: a Hadamard transform spreads an outlier over the numbers of its row.

Queries and keys that are rotated alike give the same scores, and rotated values a rotated output. Codes of rotated
rows lose less, since no number of a row stands out (QuaRot, Ashkboos et al., 2024). The transform is orthonormal, and
its own inverse.
"""

from __future__ import annotations

import mlx.core as mx

__all__ = ["MIN_BLOCK", "block_size", "rotate"]

MIN_BLOCK = 8
"""Numbers that a rotation has to mix to be worth its time."""


def block_size(dim: int) -> int:
    """The largest power of two that divides ``dim``: a row is rotated in blocks of so many numbers.

    The other sizes of :func:`mlx.core.hadamard_transform` are left out: the matrix of 80 = 20 * 4 say is not symmetric,
    hence not its own inverse, and 72 = 12 * 6, which is no size at all, MLX does not refuse but writes out of bounds.
    """
    return dim & -dim


def rotate(x: mx.array) -> mx.array:
    """``x [..., dim]`` with each row rotated, in its dtype. Rotated again it is itself, but for rounding."""
    dim = x.shape[-1]
    block = block_size(dim)
    if x.size == 0 or block == 1:
        return x
    dtype = x.dtype
    if dtype != mx.float32 and mx.default_device().type == mx.DeviceType.cpu:
        x = x.astype(mx.float32)  # MLX's CPU transform would round after each of its log2(block) steps
    if block == dim:
        y = mx.hadamard_transform(x)
    else:
        y = mx.hadamard_transform(x.reshape(*x.shape[:-1], dim // block, block)).reshape(x.shape)
    return y if y.dtype == dtype else y.astype(dtype)
