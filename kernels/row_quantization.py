"""Quantization of the new rows of a cache, keys and values together, as one pair of arrays.

A step of decoding quantizes a row or two per head. What that costs is the number of operations, not the numbers in
them: so both sides go into one array of codes and one of scales and biases, heads after heads, which takes two writes
to put into a cache that is laid out alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx

from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import quantize_parts, stack_parts

__all__ = ["quantize_rows", "quantize_rows_in_ops"]

_DTYPES = (mx.float16, mx.bfloat16, mx.float32)
_FEW = 16
"""Rows that are joined before they are quantized, which takes fewer operations; more are joined once they are small."""


def quantize_rows(sides: Sequence[mx.array], format: Format) -> tuple[mx.array, mx.array]:
    """Quantize the rows of one array, or of two (keys and values), to the bits that ``mx.quantize`` gives.

    Args:
        sides: one or two arrays ``[B, H_i, L, D]`` of one dtype (float16, bfloat16 or float32), with any strides.
            They may differ in their heads alone.
        format: fitted to ``D`` (:meth:`Format.fit`).

    Returns:
        Codes ``[B, H, L, format.words(padded)]`` uint32, where ``H`` counts the heads of all sides, one side after the
        other, and ``padded`` is ``D`` rounded up to 32; and scales ``[B, H, L, format.groups(padded)]`` in the dtype of
        ``sides`` (uint8 unless ``format`` is affine), followed along the heads by as many biases where ``format`` has
        them.

    Raises:
        TypeError, ValueError: when the sides do not fit each other or ``format``.
    """
    _check(format, sides[0].dtype, *((x.shape, x.dtype) for x in sides))
    return quantize_rows_in_ops(sides, format)


def quantize_rows_in_ops(sides: Sequence[mx.array], format: Format) -> tuple[mx.array, mx.array]:
    """:func:`quantize_rows` in MLX's own operations."""
    if len(sides) > 1 and sides[0].shape[2] > _FEW:  # no copy of all the rows
        codes, scales = stack_parts([quantize_parts(x, format) for x in sides])
        return codes, scales
    x = sides[0] if len(sides) == 1 else mx.concatenate(list(sides), axis=1)
    if x.size == 0:  # which mx.quantize takes in some formats only
        return _no_rows(x, format)
    codes, scales, *biases = quantize_parts(x, format)
    return codes, mx.concatenate([scales, *biases], axis=1) if biases else scales


def _no_rows(x: mx.array, format: Format) -> tuple[mx.array, mx.array]:
    batch, heads, count, dim = x.shape
    padded = format.fit(dim)[1]
    codes = mx.zeros((batch, heads, count, format.words(padded)), mx.uint32)
    planes = heads * (2 if format.has_biases else 1)
    return codes, mx.zeros((batch, planes, count, format.groups(padded)), x.dtype if format.is_affine else mx.uint8)


@lru_cache(maxsize=1024)
def _check(format: Format, dtype: mx.Dtype, *sides: tuple[tuple[int, ...], mx.Dtype]) -> None:
    """Raise unless arrays of these shapes and dtypes can be quantized together as ``format``."""
    if not 1 <= len(sides) <= 2:
        raise ValueError(f"{len(sides)} arrays are given: rows of one array, or of keys and values, are quantized")
    if dtype not in _DTYPES:
        raise TypeError(f"rows of {dtype} cannot be quantized: give float16, bfloat16 or float32")
    given = " and ".join(f"{shape} {other}" for shape, other in sides)
    for shape, other in sides:
        if len(shape) != 4 or (shape[0], *shape[2:], other) != (sides[0][0][0], *sides[0][0][2:], dtype):
            raise ValueError(f"rows {given}: take [batch, heads, count, dim], alike but for their heads")
    if format.fit(sides[0][0][3])[0] != format:
        raise ValueError(f"{format} does not divide rows of {sides[0][0][3]} numbers: fit it to them first")
