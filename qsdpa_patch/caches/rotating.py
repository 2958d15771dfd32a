"""The quantized twin of mlx-lm's ``RotatingKVCache``."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Self

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch.caches.base import DEFAULT_FORMAT, QuantizedCache, saved
from qsdpa_patch.caches.packed_rows import Rows, Span, capacity, join, skip, write
from qsdpa_patch.callers import only_attends
from qsdpa_patch.kernels.format import Format

__all__ = ["QuantizedRotatingKVCache"]


@saved
class QuantizedRotatingKVCache(QuantizedCache):
    """A cache of the last ``max_size`` quantized keys and values. See :class:`QuantizedCache` for the formats.

    Behaves as :class:`mlx_lm.models.cache.RotatingKVCache` does, down to the order of the rows: once ``max_size`` are
    there, a single row overwrites the oldest in place, and a longer update brings the rows into the order of time and
    keeps ``max_size - 1`` before it. Until then all updates are in place.

    Args:
        max_size: how many rows are kept.
        keep: how many rows at the start are never dropped.
    """

    _counters: ClassVar[dict[str, type]] = {"offset": int, "keep": int, "max_size": int, "_idx": int}
    offset: int

    def __init__(
        self,
        max_size: int,
        keep: int = 0,
        key_format: Format | str | None = DEFAULT_FORMAT,
        value_format: Format | str | None = "same",
    ) -> None:
        super().__init__(key_format, value_format)
        self.max_size = max_size
        self.keep = keep
        self.offset = 0
        self._idx = 0  # where the next single row goes

    make_mask = mlx_lm_cache.RotatingKVCache.make_mask
    is_trimmable = mlx_lm_cache.RotatingKVCache.is_trimmable
    size = mlx_lm_cache.RotatingKVCache.size
    trim = mlx_lm_cache.RotatingKVCache.trim

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append ``keys [B, H, S, D]`` and ``values [B, H, S, Dv]``; the rows kept, as attention gets them."""
        attends = only_attends(sys._getframe(1))
        count = keys.shape[2]
        if self.offset + count <= self.max_size:
            self._append(self.offset, keys, values, attends, self.max_size)
            self._idx = self.offset + count
        elif count == 1:
            self._overwrite(self._encode(keys, values))
        else:
            self._append_in_time(self._encode(keys, values))
        self.offset += count
        return self._hand_over(attends)

    def _span(self) -> Span:
        return 0, min(self.offset, self._capacity)

    def _overwrite(self, new: Rows) -> None:
        """Put a single row in the place of the oldest, in buffers that are full."""
        rows = self._buffers()
        surplus = capacity(rows) - self.max_size
        if surplus > 0:  # a long update left more rows than are kept
            self.rows = rows = join(rows, self._forget([(0, capacity(rows))], surplus))
            self._idx = self.max_size
        if self._idx == self.max_size:
            self._idx = self.keep
        write(rows, self._idx, self._idx + 1, new)
        self._idx += 1

    def _append_in_time(self, new: Rows) -> None:
        """Bring the rows into the order of time, and drop what the first new row does not see."""
        if self.rows is None:
            self.rows = new
        else:
            spans = self._spans_in_time(capacity(self.rows))
            spans = self._forget(spans, sum(stop - start for start, stop in spans) - (self.max_size - 1))
            self.rows = join(self.rows, spans, new)
        self._idx = capacity(self.rows)

    @staticmethod
    def _end(counters: dict[str, Any]) -> int:
        return int(counters["_idx"])

    def _spans_in_time(self, length: int) -> list[Span]:
        """The spans of the buffers, ``length`` rows long, that hold rows, oldest first."""
        if self._idx == length:
            return [(0, length)]
        if self._idx < self.offset:
            return [(0, self.keep), (self._idx, length), (self.keep, self._idx)]
        return [(0, self._idx)]

    def _forget(self, spans: list[Span], count: int) -> list[Span]:
        """``spans`` without the ``count`` oldest rows, those that are always kept aside."""
        if count <= 0:
            return spans
        (start, stop), *rest = spans
        kept = min(start + self.keep, stop)
        return [(start, kept), *skip([(kept, stop), *rest], count)]

    def rows_in_time(self, count: int) -> Rows:
        """The last ``count`` stored rows, oldest first."""
        rows = self._buffers()
        spans = self._spans_in_time(capacity(rows))
        return join(rows, skip(spans, sum(stop - start for start, stop in spans) - count))

    @classmethod
    def merge(cls, caches: list[Any]) -> Any:
        """A batch cache of these caches, each of one sequence."""
        from qsdpa_patch.caches.batch_rotating import BatchQuantizedRotatingKVCache  # which is made of the class here

        return BatchQuantizedRotatingKVCache.merge(caches)

    @classmethod
    def from_cache(
        cls, cache: Any, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = "same"
    ) -> Self:
        """A cache with the contents of mlx-lm's ``RotatingKVCache``, row for row, in these formats."""
        quantized = cls(cache.max_size, cache.keep, key_format, value_format)
        quantized.offset, quantized._idx = cache.offset, cache._idx
        quantized._adopt(cache.keys, cache.values)
        return quantized
