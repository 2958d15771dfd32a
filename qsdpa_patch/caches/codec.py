"""How new rows of keys or values are stored, and what attention gets back.

A codec is fitted once, to the first rows that a cache sees, and never changes: it may be shared by caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qsdpa_patch.caches.packed_rows import Rows
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, quantize_parts

__all__ = ["Codec", "PlainCodec", "QuantizingCodec", "as_format", "fit_codec"]


@dataclass(frozen=True)
class PlainCodec:
    """Rows ``[B, H, S, dim]`` kept as they are, in ``dtype``."""

    dim: int
    dtype: mx.Dtype

    format = None

    def encode(self, x: mx.array) -> Rows:
        _check_dim(x, self.dim)
        return [x[:]]  # an array object of our own: writing changes the object

    def decode(self, rows: Rows) -> mx.array:
        return rows[0]

    def check(self, rows: Rows) -> None:
        """Raise ValueError unless ``rows`` are such rows."""
        if len(rows) != 1 or rows[0].ndim != 4 or rows[0].shape[3] != self.dim or rows[0].dtype != self.dtype:
            raise ValueError(f"{_describe(rows)} are no plain rows of {self.dim} numbers in {self.dtype}")

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainCodec:
        return self


@dataclass(frozen=True)
class QuantizingCodec:
    """Rows ``[B, H, S, dim]`` of ``dtype`` stored as codes, scales and biases of ``format`` (fitted to ``dim``)."""

    format: Format
    dim: int
    dtype: mx.Dtype

    def encode(self, x: mx.array) -> Rows:
        _check_dim(x, self.dim)
        return list(quantize_parts(x, self.format))

    def decode(self, rows: Rows) -> QuantizedTensor:
        codes, scales, *biases = rows
        return QuantizedTensor(
            codes, scales, biases[0] if biases else None, self.format, dim=self.dim, dtype=self.dtype
        )

    def check(self, rows: Rows) -> None:
        """Raise ValueError unless ``rows`` are such rows."""
        if len(rows) != 2 + self.format.has_biases or rows[0].ndim != 4:
            raise ValueError(f"{_describe(rows)} are no rows quantized as {self.format}")
        try:
            self.decode(rows)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizingCodec:
        return self


Codec = PlainCodec | QuantizingCodec


def as_format(format: Format | str | None, name: str) -> Format | None:
    """``format`` itself, or the floating-point format of that name. ``None`` stands for rows left as they are."""
    if format is None or isinstance(format, Format):
        return format
    if isinstance(format, str):
        return Format.named(format)
    raise TypeError(f"{name} is {type(format).__name__}: give a Format, the name of one, or None for plain rows")


def fit_codec(format: Format | None, dim: int, dtype: mx.Dtype) -> Codec:
    """The codec for rows of ``dim`` numbers of ``dtype``; rows of no numbers at all stay plain."""
    if format is None or dim == 0:
        return PlainCodec(dim, dtype)
    if dtype not in (mx.float16, mx.bfloat16, mx.float32):
        raise TypeError(f"rows of {dtype} cannot be quantized: give float16, bfloat16 or float32")
    return QuantizingCodec(format.fit(dim)[0], dim, dtype)


def _check_dim(x: mx.array, dim: int) -> None:
    if x.ndim != 4 or x.shape[3] != dim:
        raise ValueError(f"new rows have shape {tuple(x.shape)}: this cache takes [batch, heads, count, {dim}]")


def _describe(rows: Rows) -> str:
    return "rows " + ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in rows)
