"""The quantized twin of mlx-lm's ``ChunkedKVCache``."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Self

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch.caches.base import DEFAULT_FORMAT, QuantizedCache, saved
from qsdpa_patch.caches.packed_rows import Span, grow, next_capacity, select
from qsdpa_patch.callers import only_attends
from qsdpa_patch.kernels.format import Format

__all__ = ["QuantizedChunkedKVCache"]


@saved
class QuantizedChunkedKVCache(QuantizedCache):
    """A cache of quantized keys and values for chunked attention (Llama 4). See :class:`QuantizedCache` for formats.

    Behaves as :class:`mlx_lm.models.cache.ChunkedKVCache` does, but drops old rows without a copy: they stay in the
    buffers until these are full.

    Args:
        chunk_size: how many rows :meth:`maybe_trim_front` leaves.
    """

    _counters: ClassVar[dict[str, type]] = {"offset": int, "chunk_size": int, "start_position": int, "_first": int}
    offset: int

    def __init__(
        self,
        chunk_size: int,
        key_format: Format | str | None = DEFAULT_FORMAT,
        value_format: Format | str | None = "same",
    ) -> None:
        super().__init__(key_format, value_format)
        self.chunk_size = chunk_size
        self.offset = 0
        self.start_position = 0
        self._first = 0  # where row start_position is in the buffers

    is_trimmable = mlx_lm_cache.ChunkedKVCache.is_trimmable
    trim = mlx_lm_cache.ChunkedKVCache.trim

    def maybe_trim_front(self) -> None:
        """Drop all but the last ``chunk_size`` rows."""
        surplus = self.offset - self.start_position - self.chunk_size
        if not self.empty() and surplus > 0:
            self.start_position += surplus
            self._first += surplus

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append ``keys [B, H, S, D]`` and ``values [B, H, S, Dv]``; the rows kept, as attention gets them."""
        attends = only_attends(sys._getframe(1))
        count = keys.shape[2]
        used = self.offset - self.start_position
        if self._first + used + count > self._capacity:
            self._make_room(used, count)
        self._append(self._first + used, keys, values, attends)
        self.offset += count
        return self._hand_over(attends)

    def _span(self) -> Span:
        return self._first, self._first + self.offset - self.start_position

    def _make_room(self, used: int, count: int) -> None:
        """Buffers that take ``count`` rows more than the ``used`` ones, which come first in them."""
        if not self.empty():
            kept = select(self._buffers(), self._first, self._first + used)
            self.rows = grow(kept, used, next_capacity(used + count, used))
            self._first = 0

    @staticmethod
    def _end(counters: dict[str, Any]) -> int:
        return int(counters["_first"] + counters["offset"] - counters["start_position"])

    @classmethod
    def from_cache(
        cls, cache: Any, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = "same"
    ) -> Self:
        """A cache with the contents of mlx-lm's ``ChunkedKVCache`` in these formats."""
        quantized = cls(cache.chunk_size, key_format, value_format)
        quantized.offset, quantized.start_position = cache.offset, cache.start_position
        quantized._adopt(cache.keys, cache.values)
        return quantized
