"""Which buffers hold what: how a layer's keys and values become the rows of its cache, and rows keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from qsdpa_patch.caches.codec import Codec, QuantizingCodec
from qsdpa_patch.caches.packed_rows import Rows
from qsdpa_patch.kernels.quantized_tensor import StackMember

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How keys and values are stored, each by a codec of its own.

    Where both are quantized alike they share buffers, so that a step writes to two. Otherwise the buffers of the keys
    come first, then those of the values.
    """

    keys: Codec
    values: Codec

    @cached_property
    def shared(self) -> bool:
        """Whether keys and values are in the same buffers."""
        return self.keys == self.values and isinstance(self.keys, QuantizingCodec)

    def encode(self, keys: mx.array, values: mx.array) -> Rows:
        """New rows ``keys [B, H, S, D]`` and ``values [B, H, S, Dv]`` as they are stored.

        Raises:
            ValueError: rows of another shape.
        """
        key_shape, value_shape = keys.shape, values.shape
        for shape, codec in ((key_shape, self.keys), (value_shape, self.values)):
            if len(shape) != 4 or shape[3] != codec.dim:
                raise ValueError(f"new rows have shape {shape}: this cache takes [batch, heads, count, {codec.dim}]")
        if key_shape[:3] != value_shape[:3]:
            raise ValueError(f"new keys {key_shape} and values {value_shape} differ in batch, heads or count")
        if self.shared:
            return self.keys.encode([keys, values])
        return self.keys.encode([keys]) + self.values.encode([values])

    def decode(self, rows: Rows) -> tuple[mx.array, mx.array]:
        """Stored rows as attention gets them: a :class:`QuantizedTensor` each, or plain rows."""
        if self.shared:
            keys, values = self.keys.decode(rows, 2)
        else:
            split = self.keys.buffers
            (keys,), (values,) = self.keys.decode(rows[:split], 1), self.values.decode(rows[split:], 1)
        return keys, values

    def members(self, rows: Rows) -> tuple[StackMember, StackMember]:
        """Stored rows of shared buffers as attention takes them, without arrays."""
        assert isinstance(self.keys, QuantizingCodec)
        keys, values = self.keys.stack(rows, 2).members()
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
