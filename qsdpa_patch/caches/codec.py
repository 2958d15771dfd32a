"""How new rows are stored, and what attention gets back.

A codec is fitted once, to the first rows that a cache sees, and never changes: it may be shared by caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from qsdpa_patch.caches.packed_rows import Rows
from qsdpa_patch.kernels.dtypes import dtype_name, dtype_of_name
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.pending_rows import PendingRows, RowWriter
from qsdpa_patch.kernels.quantized_tensor import PackedStack
from qsdpa_patch.kernels.row_quantization import quantize_rows, row_quantizer
from qsdpa_patch.kernels.row_writing import row_writer

__all__ = ["Codec", "Encoder", "PlainCodec", "QuantizingCodec", "as_format", "fit_codec"]

Encoder = Callable[[list[mx.array]], Rows]
"""From new rows of one side or more to how they are stored."""


@dataclass(frozen=True)
class PlainCodec:
    """Rows ``[B, H, S, dim]`` kept as they are, in ``dtype``: one buffer a side."""

    dim: int
    dtype: mx.Dtype

    format = None

    buffers = 1

    def encode(self, sides: Sequence[mx.array]) -> Rows:
        return [x[:] for x in sides]  # array objects of our own: writing changes the object

    def encoder(self, sides: list[mx.array]) -> Encoder:
        """:meth:`encode` for sides of these shapes and dtypes."""
        return self.encode

    def decode(self, rows: Rows, sides: int) -> Sequence[mx.array]:
        return rows

    def check(self, rows: Rows, sides: int) -> None:
        """Raise ValueError unless ``rows`` are such rows."""
        for x in rows:
            if x.ndim != 4 or x.shape[3] != self.dim or x.dtype != self.dtype:
                raise ValueError(f"{_describe(rows)} are no plain rows of {self.dim} numbers in {self.dtype}")

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainCodec:
        return self

    def __reduce__(self) -> Any:
        return _unpickled, (PlainCodec, dtype_name(self.dtype), self.dim)


@dataclass(frozen=True)
class QuantizingCodec:
    """Rows ``[B, H, S, dim]`` of ``dtype`` stored in ``format`` (fitted to ``dim``): two buffers for one side or more.

    One holds the codes of all sides, the other their scales and biases, as :class:`PackedStack` has them.
    """

    format: Format
    dim: int
    dtype: mx.Dtype
    _signatures: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    buffers = 2

    def encode(self, sides: Sequence[mx.array]) -> Rows:
        return quantize_rows([x if x.dtype == self.dtype else x.astype(self.dtype) for x in sides], self.format)

    def encoder(self, sides: list[mx.array]) -> Encoder:
        """:meth:`encode` for sides of these shapes and dtypes, on the device that is the default now."""
        return row_quantizer(sides, self.format) if all(x.dtype == self.dtype for x in sides) else self.encode

    def decode(self, rows: Rows, sides: int) -> Sequence[mx.array]:
        return self.stack(rows, sides).tensors()

    def writer(self, sides: list[mx.array]) -> RowWriter | None:
        """What stores such sides in buffers that are there, where a kernel of the default device can."""
        return row_writer(sides, self.format) if all(x.dtype == self.dtype for x in sides) else None

    def stack(
        self, rows: Rows, sides: int, count: int | None = None, pending: PendingRows | None = None
    ) -> PackedStack:
        """Stored rows of that many sides: the first ``count``, or all."""
        return PackedStack(
            rows[0], rows[1], sides, self.format,
            dim=self.dim, dtype=self.dtype, signatures=self._signatures, rows=count, pending=pending,
        )  # fmt: skip

    def check(self, rows: Rows, sides: int) -> None:
        """Raise ValueError unless ``rows`` are such rows."""
        try:
            self.stack(rows, sides).check()
        except TypeError as error:
            raise ValueError(str(error)) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizingCodec:
        return self

    def __reduce__(self) -> Any:
        return _unpickled, (QuantizingCodec, dtype_name(self.dtype), self.format, self.dim)


Codec = PlainCodec | QuantizingCodec


def _unpickled(codec: Callable[..., Codec], dtype: str, *arguments: Any) -> Codec:
    """A codec from the name of its dtype, since MLX pickles no dtypes, and its other arguments."""
    return codec(*arguments, dtype_of_name(dtype))


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


def _describe(rows: Rows) -> str:
    return "rows " + ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in rows)
