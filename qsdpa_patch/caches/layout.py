"""Which buffers hold what: how a layer's keys and values become the rows of its cache, and rows keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import mlx.core as mx

from qsdpa_patch.caches.codec import Codec, Encoder, QuantizingCodec
from qsdpa_patch.caches.packed_rows import Rows
from qsdpa_patch.kernels.pending_rows import PendingRows, RowWriter
from qsdpa_patch.kernels.quantized_tensor import StackMember

__all__ = ["Layout"]

_MOST_KINDS = 16
"""Kinds of new rows that a layout remembers how to store."""

_Kind = tuple[object, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How keys and values are stored, each by a codec of its own.

    Where both are quantized alike they share buffers, so that a step writes to two. Otherwise the buffers of the keys
    come first, then those of the values.
    """

    keys: Codec
    values: Codec
    _encoders: dict[_Kind, Encoder] = field(default_factory=dict, init=False, repr=False, compare=False)
    _writers: dict[_Kind, RowWriter | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def quantized(self) -> bool:
        """Whether both keys and values are quantized."""
        return isinstance(self.keys, QuantizingCodec) and isinstance(self.values, QuantizingCodec)

    @cached_property
    def shared(self) -> bool:
        """Whether keys and values are in the same buffers."""
        return self.quantized and self.keys == self.values

    def encode(self, keys: mx.array, values: mx.array) -> Rows:
        """New rows ``keys [B, H, S, D]`` and ``values [B, H, S, Dv]`` as they are stored.

        Raises:
            ValueError: rows of another shape.
        """
        kind = _kind(keys, values)
        encoder = self._encoders.get(kind)
        if encoder is None:
            encoder = _remember(self._encoders, kind, self._encoder(keys, values))
        return encoder([keys, values])

    def writer(self, keys: mx.array, values: mx.array) -> RowWriter | None:
        """What stores such new rows, as :meth:`encode` does, in buffers that are there; ``None`` where no kernel can.

        Raises:
            ValueError: rows of another shape.
        """
        kind = _kind(keys, values)
        if kind in self._writers:
            return self._writers[kind]
        self._check_new(keys, values)
        writer = self.keys.writer([keys, values]) if self.shared and isinstance(self.keys, QuantizingCodec) else None
        return _remember(self._writers, kind, writer)

    def _encoder(self, keys: mx.array, values: mx.array) -> Encoder:
        """What encodes new rows of these shapes and dtypes."""
        self._check_new(keys, values)
        if self.shared:
            return self.keys.encoder([keys, values])
        encode_keys, encode_values = self.keys.encoder([keys]), self.values.encoder([values])
        return lambda sides: encode_keys(sides[:1]) + encode_values(sides[1:])

    def _check_new(self, keys: mx.array, values: mx.array) -> None:
        """Raise ValueError unless new rows have the shapes that are stored."""
        key_shape, value_shape = keys.shape, values.shape
        for shape, codec in ((key_shape, self.keys), (value_shape, self.values)):
            if len(shape) != 4 or shape[3] != codec.dim:
                raise ValueError(f"new rows have shape {shape}: this cache takes [batch, heads, count, {codec.dim}]")
        if key_shape[:3] != value_shape[:3]:
            raise ValueError(f"new keys {key_shape} and values {value_shape} differ in batch, heads or count")

    def decode(self, rows: Rows) -> tuple[mx.array, mx.array]:
        """Stored rows as attention gets them: a :class:`QuantizedTensor` each, or plain rows."""
        if self.shared:
            keys, values = self.keys.decode(rows, 2)
        else:
            split = self.keys.buffers
            (keys,), (values,) = self.keys.decode(rows[:split], 1), self.values.decode(rows[split:], 1)
        return keys, values

    def members(
        self, rows: Rows, count: int | None = None, pending: PendingRows | None = None
    ) -> tuple[StackMember, StackMember]:
        """Stored rows, quantized on both sides, for attention alone: the first ``count``, or all.

        pending: those of them that a writer may still have to write.
        """
        assert isinstance(self.keys, QuantizingCodec)
        assert isinstance(self.values, QuantizingCodec)
        if self.shared:
            keys, values = self.keys.stack(rows, 2, count, pending).members()
        else:
            split = self.keys.buffers
            (keys,) = self.keys.stack(rows[:split], 1, count).members()
            (values,) = self.values.stack(rows[split:], 1, count).members()
        return keys, values

    def check(self, rows: Rows) -> None:
        """Raise ValueError unless ``rows`` are stored so."""
        buffers = 2 if self.shared else self.keys.buffers + self.values.buffers
        if len(rows) != buffers:
            raise ValueError(f"{len(rows)} buffers in place of {buffers}")
        if self.shared:
            self.keys.check(rows, 2)
        else:
            split = self.keys.buffers
            self.keys.check(rows[:split], 1)
            self.values.check(rows[split:], 1)
        keys, values = self.decode(rows)
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"keys {keys.shape} and values {values.shape} differ")

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        return self

    def __reduce__(self) -> Any:
        return Layout, (self.keys, self.values)


def _kind(keys: mx.array, values: mx.array) -> _Kind:
    """All that the way to store new rows depends on."""
    return keys.shape, values.shape, keys.dtype, values.dtype, mx.default_device() == mx.gpu


def _remember(known: dict[_Kind, T], kind: _Kind, value: T) -> T:
    if len(known) >= _MOST_KINDS:
        known.clear()
    known[kind] = value
    return value
