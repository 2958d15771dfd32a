"""The quantized twin of mlx-lm's ``KVCache``."""

from __future__ import annotations

import sys
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch.caches.base import DEFAULT_FORMAT, QuantizedCache, saved
from qsdpa_patch.caches.codec import Codec, fit_codec
from qsdpa_patch.caches.layout import Layout
from qsdpa_patch.caches.packed_rows import Rows, Span, select
from qsdpa_patch.callers import only_attends
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import dequantize_parts, stack_parts

__all__ = ["QuantizedKVCache"]


@saved
class QuantizedKVCache(QuantizedCache):
    """A growing cache of quantized keys and values. See :class:`QuantizedCache` for the formats.

    Behaves as :class:`mlx_lm.models.cache.KVCache` does.
    """

    offset: int

    def __init__(
        self, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = "same"
    ) -> None:
        super().__init__(key_format, value_format)
        self.offset = 0

    make_mask = mlx_lm_cache.KVCache.make_mask
    is_trimmable = mlx_lm_cache.KVCache.is_trimmable
    size = mlx_lm_cache.KVCache.size
    trim = mlx_lm_cache.KVCache.trim

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append ``keys [B, H, S, D]`` and ``values [B, H, S, Dv]``; all rows, as attention gets them."""
        attends = only_attends(sys._getframe(1))
        self._append(self.offset, keys, values, attends)
        self.offset += keys.shape[2]
        return self._hand_over(attends)

    def _span(self) -> Span:
        return 0, self.offset

    def rows_in_time(self, count: int) -> Rows:
        """The last ``count`` stored rows, oldest first."""
        return select(self._buffers(), self.offset - count, self.offset)

    @classmethod
    def merge(cls, caches: list[Any]) -> Any:
        """A batch cache of these caches, each of one sequence."""
        from qsdpa_patch.caches.batch import BatchQuantizedKVCache  # which is made of the class here

        return BatchQuantizedKVCache.merge(caches)

    @classmethod
    def from_cache(
        cls, cache: Any, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = "same"
    ) -> Self:
        """A cache with the contents of mlx-lm's ``KVCache`` or ``QuantizedKVCache``, in these formats.

        Rows that are in the format already stay as they are packed. ``cache`` stays as it was.
        """
        quantized = cls(key_format, value_format)
        quantized.offset = cache.offset
        if isinstance(cache, mlx_lm_cache.QuantizedKVCache):
            quantized._adopt_packed(cache.keys, cache.values, Format.affine(cache.bits, cache.group_size))
        else:
            quantized._adopt(cache.keys, cache.values)
        return quantized

    def _adopt_packed(self, keys: Any, values: Any, stored: Format) -> None:
        """Take over packed buffers (codes, scales, biases) of another cache, stored in the format ``stored``."""
        if keys is None:
            return
        layout = Layout(
            *(
                fit_codec(format, parts[0].shape[-1] * 32 // stored.bits, parts[1].dtype)
                for format, parts in ((self.key_format, keys), (self.value_format, values))
            )
        )
        if layout.shared:
            self.rows = _repack([keys, values], stored, layout.keys)
        else:
            self.rows = _repack([keys], stored, layout.keys) + _repack([values], stored, layout.values)
        self._set_layout(layout)


def _repack(sides: list[Any], stored: Format, codec: Codec) -> Rows:
    """The rows of ``sides``, each packed in the format ``stored``, as ``codec`` stores them."""
    if codec.format == stored:
        return stack_parts(sides)
    return codec.encode([dequantize_parts(codes, scales, biases, stored) for codes, scales, biases in sides])
