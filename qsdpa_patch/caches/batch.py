"""The quantized twin of mlx-lm's ``BatchKVCache``, and the same for latents."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Self

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch.caches.base import DEFAULT_FORMAT, saved
from qsdpa_patch.caches.batch_base import BatchQuantizedCache
from qsdpa_patch.caches.latent import LatentCache, QuantizedLatentCache
from qsdpa_patch.caches.packed_rows import Span, capacity, compact, pick, roll_each, select
from qsdpa_patch.caches.quantized import QuantizedKVCache
from qsdpa_patch.callers import only_attends
from qsdpa_patch.kernels.format import Format

__all__ = ["BatchQuantizedKVCache", "BatchQuantizedLatentCache"]


@saved
class BatchQuantizedKVCache(BatchQuantizedCache):
    """A growing cache of the quantized keys and values of several sequences. See :class:`BatchQuantizedCache`.

    Behaves as :class:`mlx_lm.models.cache.BatchKVCache` does.
    """

    _counters: ClassVar[dict[str, type]] = {"offset": mx.array, "left_padding": mx.array, "_idx": int}
    _single: ClassVar[type[QuantizedKVCache]] = QuantizedKVCache
    _right_padding: mx.array | None = None  # of the rows to come, until finalize

    make_mask = mlx_lm_cache.BatchKVCache.make_mask
    is_trimmable = mlx_lm_cache.BatchKVCache.is_trimmable
    size = mlx_lm_cache.BatchKVCache.size
    trim = mlx_lm_cache.BatchKVCache.trim

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append ``keys [B, H, S, D]`` and ``values [B, H, S, Dv]``; all rows, as attention gets them."""
        attends = only_attends(sys._getframe(1))
        self._append(self._idx, keys, values, attends)
        self.offset = self.offset + keys.shape[2]
        self._idx += keys.shape[2]
        return self._hand_over(attends)

    def _span(self) -> Span:
        return 0, self._idx

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Announce padding: on the left of an empty cache, or on the right of the rows to come until :meth:`finalize`.

        Raises:
            ValueError: left padding for a cache that has rows.
        """
        if left_padding is not None:
            self._add_left_padding(left_padding)
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = mx.array(right_padding)

    def finalize(self) -> None:
        """Move the right padding that was announced to the left."""
        if self._right_padding is None:
            return
        padding, self._right_padding = self._right_padding, None
        self.rows = roll_each(self._buffers(), padding)
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding

    def filter(self, batch_indices: Any) -> None:
        """Keep the sequences ``batch_indices``, and no more padding than they need."""
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]
        paddings: Any = self.left_padding.tolist()
        surplus = max(0, min(paddings))
        if self.rows is not None:
            self.rows = select(pick(self.rows, batch_indices), surplus, capacity(self.rows))
        self._idx -= surplus
        self.left_padding = self.left_padding - surplus

    def extend(self, other: Any) -> None:
        """Add the sequences of ``other``, a cache of the same class and formats."""
        self._extend(other)

    def extract(self, idx: int) -> Any:
        """The sequence ``idx`` as a cache of its own."""
        cache = self._single(self.key_format, self.value_format)
        if self.rows is not None:
            paddings: Any = self.left_padding.tolist()
            first = min(paddings[idx], self._idx)
            cache._take(self, compact(select(pick(self.rows, slice(idx, idx + 1)), first, self._idx)))
            cache.offset = self._idx - first
        return cache

    @classmethod
    def merge(cls, caches: list[Any]) -> Self:
        """A batch of single caches, empty ones included.

        Raises:
            TypeError, ValueError: caches of another class, or of different formats.
        """
        longest = max(cache.size() for cache in caches)
        batch = cls([longest - cache.size() for cache in caches], caches[0].key_format, caches[0].value_format)
        batch._fill(caches, cls._single)
        return batch

    @classmethod
    def from_cache(
        cls, cache: Any, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = "same"
    ) -> Self:
        """A cache with the contents of mlx-lm's ``BatchKVCache`` in these formats."""
        quantized = cls([], key_format, value_format)
        quantized.left_padding, quantized.offset = mx.array(cache.left_padding), mx.array(cache.offset)
        quantized._idx, quantized._right_padding = cache._idx, cache._right_padding
        quantized._adopt(cache.keys, cache.values)
        return quantized


@saved
class BatchQuantizedLatentCache(LatentCache, BatchQuantizedKVCache):
    """A :class:`QuantizedLatentCache` for several sequences: latents quantized, rotary keys plain."""

    _single: ClassVar[type[QuantizedKVCache]] = QuantizedLatentCache

    def __init__(
        self,
        left_padding: list[int],
        key_format: Format | str | None = DEFAULT_FORMAT,
        value_format: Format | str | None = None,
    ) -> None:
        super().__init__(left_padding, key_format, value_format)

    @classmethod
    def from_cache(
        cls, cache: Any, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = None
    ) -> Self:
        """A cache with the contents of mlx-lm's ``BatchKVCache`` of latents and rotary keys, in these formats."""
        return super().from_cache(cache, key_format, value_format)
