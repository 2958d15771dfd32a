"""The quantized twin of mlx-lm's ``BatchRotatingKVCache``."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Self

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch.caches.base import DEFAULT_FORMAT, saved
from qsdpa_patch.caches.batch_base import BatchQuantizedCache
from qsdpa_patch.caches.packed_rows import (
    Rows,
    Span,
    append,
    capacity,
    compact,
    join,
    pick,
    roll_each,
    select,
    skip,
    write,
)
from qsdpa_patch.caches.rotating import QuantizedRotatingKVCache
from qsdpa_patch.callers import only_attends
from qsdpa_patch.kernels.format import Format

__all__ = ["BatchQuantizedRotatingKVCache"]


@saved
class BatchQuantizedRotatingKVCache(BatchQuantizedCache):
    """A cache of the last ``max_size`` quantized keys and values of several sequences.

    Behaves as :class:`mlx_lm.models.cache.BatchRotatingKVCache` does, down to the order of the rows. See
    :class:`QuantizedRotatingKVCache` and :class:`BatchQuantizedCache`.

    Args:
        max_size: how many rows are kept.
        left_padding: rows of padding before each sequence.
    """

    _counters: ClassVar[dict[str, type]] = {
        "offset": mx.array, "left_padding": mx.array, "max_size": int, "_offset": int, "_idx": int, "rotated": bool,
    }  # fmt: skip
    _lengths: mx.array | None = None  # up to which the sequences will be right-padded, until finalize

    def __init__(
        self,
        max_size: int,
        left_padding: list[int],
        key_format: Format | str | None = DEFAULT_FORMAT,
        value_format: Format | str | None = "same",
    ) -> None:
        super().__init__(left_padding, key_format, value_format)
        self.max_size = max_size
        self.rotated = False
        self._offset = 0

    make_mask = mlx_lm_cache.BatchRotatingKVCache.make_mask
    is_trimmable = mlx_lm_cache.BatchRotatingKVCache.is_trimmable
    size = mlx_lm_cache.BatchRotatingKVCache.size
    trim = mlx_lm_cache.BatchRotatingKVCache.trim

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append ``keys [B, H, S, D]`` and ``values [B, H, S, Dv]``; the rows kept, as attention gets them.

        Raises:
            RuntimeError: a single row between :meth:`prepare` with right padding and :meth:`finalize`.
        """
        count = keys.shape[2]
        if count == 1 and self._lengths is not None:  # the mask for a single row would not fit the order of the rows
            raise RuntimeError(f"finalize() comes before decoding with {type(self).__qualname__}")
        new = self._encode(keys, values)
        if self._lengths is None and self._offset + count <= self.max_size:
            self.rows = append(self.rows, self._offset, new, self.max_size)
            self._idx = self._offset + count
        elif count == 1:
            self._overwrite(new)
        else:
            self._append_in_time(new)
        self.offset = self.offset + count
        self._offset += count
        # The counters are evaluated with the rows: their graphs would grow without end otherwise.
        self.rows = mx.depends(self._buffers(), (self.left_padding, self.offset))
        return self._hand_over(only_attends(sys._getframe(1)))

    def _span(self) -> Span:
        return 0, min(self._offset, self._capacity)

    def _overwrite(self, new: Rows) -> None:
        """Put a single row in the place of the oldest, in buffers that are full."""
        rows = self._buffers()
        length = capacity(rows)
        surplus = length - self.max_size
        if surplus > 0:  # a long update left more rows than are kept
            self.rows = rows = select(rows, surplus, length)
            self.left_padding = self.left_padding - surplus
            self._idx = self.max_size
        if self._idx == self.max_size:
            self.rotated = True
            self._idx = 0
        if self.rotated:
            self.left_padding = self.left_padding - 1
        write(rows, self._idx, self._idx + 1, new)
        self._idx += 1

    def _append_in_time(self, new: Rows) -> None:
        """Bring the rows into the order of time, and drop what the first new row does not see."""
        if self.rows is None:
            self.rows = new
        else:
            if self._lengths is not None:
                self._put_in_time()
                self._roll_to(self._lengths)
            spans = self._spans_in_time()
            surplus = sum(stop - start for start, stop in spans) - (self.max_size - 1)
            if surplus > 0:
                self.left_padding = self.left_padding - surplus
            self.rows = join(self._buffers(), skip(spans, surplus), new)
            self.rotated = False
        self._idx = capacity(self.rows)

    def _spans_in_time(self) -> list[Span]:
        """The spans of the buffers that hold rows, oldest first."""
        if self.rotated:
            return [(self._idx, capacity(self._buffers())), (0, self._idx)]
        return [(0, self._idx)]

    def _put_in_time(self) -> None:
        """Bring the rows into the order of time."""
        self.rows = join(self._buffers(), self._spans_in_time())
        self._idx = capacity(self.rows)
        self.rotated = False

    def _roll_to(self, lengths: mx.array) -> None:
        """Move what lies beyond ``lengths`` in each sequence, padding, to its start."""
        surplus = mx.maximum(0, self.offset - lengths)
        self.rows = roll_each(self._buffers(), surplus)
        self.left_padding = self.left_padding + surplus
        self.offset = self.offset - surplus

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Announce padding: on the left of an empty cache, or on the right of the rows to come until :meth:`finalize`.

        ``lengths`` are those of the rows to come, without their padding.

        Raises:
            ValueError: left padding for a cache that has rows, or right padding without ``lengths``.
        """
        if left_padding is not None:
            self._add_left_padding(left_padding)
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError("right_padding takes lengths with it")
            self._lengths = mx.array(lengths) + self.offset

    def finalize(self) -> None:
        """Move the right padding that was announced to the left."""
        if self._lengths is not None:
            self._roll_to(self._lengths)
            self._lengths = None

    def filter(self, batch_indices: Any) -> None:
        """Keep the sequences ``batch_indices``."""
        if self.rows is not None:
            self.rows = pick(self.rows, batch_indices)
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]

    def extend(self, other: Any) -> None:
        """Add the sequences of ``other``, a cache of the same class, size and formats."""
        if self.rotated != other.rotated or self._idx != other._idx:
            for cache in (self, other):
                if cache.rotated:
                    cache._put_in_time()
        self._extend(other)
        self._offset = max(self._offset, other._offset)

    def extract(self, idx: int) -> Any:
        """The sequence ``idx`` as a cache of its own."""
        cache = QuantizedRotatingKVCache(self.max_size, 0, self.key_format, self.value_format)
        if self.rows is None:
            return cache
        paddings: Any = self.left_padding.tolist()
        offsets: Any = self.offset.tolist()
        spans = skip(self._spans_in_time(), max(0, paddings[idx]))
        cache.offset = offsets[idx]
        rows = join(pick(self.rows, slice(idx, idx + 1)), spans)
        cache._take(self, compact(rows))
        cache._idx = capacity(rows)
        return cache

    @classmethod
    def merge(cls, caches: list[Any]) -> Self:
        """A batch of single caches, empty ones included.

        Raises:
            TypeError, ValueError: caches of another class, or of different sizes or formats.
        """
        longest = max(cache.size() for cache in caches)
        padding = [longest - cache.size() for cache in caches]
        batch = cls(caches[0].max_size, padding, caches[0].key_format, caches[0].value_format)
        batch._fill(caches, QuantizedRotatingKVCache)
        if any(cache.max_size != batch.max_size for cache in caches):
            raise ValueError(f"caches of the sizes {[cache.max_size for cache in caches]} make no batch")
        batch._offset = longest
        return batch

    @classmethod
    def from_cache(
        cls, cache: Any, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = "same"
    ) -> Self:
        """A cache with the contents of mlx-lm's ``BatchRotatingKVCache``, row for row, in these formats."""
        quantized = cls(cache.max_size, [], key_format, value_format)
        quantized.left_padding, quantized.offset = mx.array(cache.left_padding), mx.array(cache.offset)
        quantized._idx, quantized._offset, quantized.rotated = cache._idx, cache._offset, cache.rotated
        quantized._lengths = cache._lengths
        quantized._adopt(cache.keys, cache.values)
        return quantized
