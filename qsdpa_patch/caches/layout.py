"""Which buffers hold what: how a layer's keys and values become the rows of its cache, and rows keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx

from qsdpa_patch.caches.codec import Codec, Encoder, QuantizingCodec
from qsdpa_patch.caches.packed_rows import Rows
from qsdpa_patch.kernels.quantized_tensor import StackMember

__all__ = ["Layout"]

_MOST_ENCODERS = 16
"""Kinds of new rows that a layout remembers how to encode."""


@dataclass(frozen=True)
class Layout:
    """How keys and values are stored, each by a codec of its own.

    Where both are quantized alike they share buffers, so that a step writes to two. Otherwise the buffers of the keys
    come first, then those of the values.
    """

    keys: Codec
    values: Codec
    _encoders: dict[tuple[object, ...], Encoder] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        kind = keys.shape, values.shape, keys.dtype, values.dtype, mx.default_device() == mx.gpu
        encoder = self._encoders.get(kind)
        if encoder is None:
            if len(self._encoders) >= _MOST_ENCODERS:
                self._encoders.clear()
            encoder = self._encoders[kind] = self._encoder(keys, values)
        return encoder([keys, values])

    def _encoder(self, keys: mx.array, values: mx.array) -> Encoder:
        """What encodes new rows of these shapes and dtypes."""
        key_shape, value_shape = keys.shape, values.shape
        for shape, codec in ((key_shape, self.keys), (value_shape, self.values)):
            if len(shape) != 4 or shape[3] != codec.dim:
                raise ValueError(f"new rows have shape {shape}: this cache takes [batch, heads, count, {codec.dim}]")
        if key_shape[:3] != value_shape[:3]:
            raise ValueError(f"new keys {key_shape} and values {value_shape} differ in batch, heads or count")
        if self.shared:
            return self.keys.encoder([keys, values])
        encode_keys, encode_values = self.keys.encoder([keys]), self.values.encoder([values])
        return lambda sides: encode_keys(sides[:1]) + encode_values(sides[1:])

    def decode(self, rows: Rows) -> tuple[mx.array, mx.array]:
        """Stored rows as attention gets them: a :class:`QuantizedTensor` each, or plain rows."""
        if self.shared:
            keys, values = self.keys.decode(rows, 2)
        else:
            split = self.keys.buffers
            (keys,), (values,) = self.keys.decode(rows[:split], 1), self.values.decode(rows[split:], 1)
        return keys, values

    def members(self, rows: Rows, count: int | None = None) -> tuple[StackMember, StackMember]:
        """Stored rows, quantized on both sides, for attention alone: the first ``count``, or all."""
        assert isinstance(self.keys, QuantizingCodec)
        assert isinstance(self.values, QuantizingCodec)
        if self.shared:
            keys, values = self.keys.stack(rows, 2, count).members()
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
