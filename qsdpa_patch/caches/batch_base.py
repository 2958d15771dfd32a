"""What the batch caches share."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qsdpa_patch.caches.base import DEFAULT_FORMAT, QuantizedCache
from qsdpa_patch.caches.codec import fit_codec
from qsdpa_patch.caches.layout import Layout
from qsdpa_patch.caches.packed_rows import Rows, allocate, capacity, pad, select, stack
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.layer_tags import set_tag, tag_of

__all__ = ["BatchQuantizedCache"]


class BatchQuantizedCache(QuantizedCache):
    """Quantized keys and values of several sequences, padded on the left to end together.

    Args:
        left_padding: rows of padding before each sequence.
        key_format, value_format: as for :class:`QuantizedCache`.
    """

    offset: mx.array
    left_padding: mx.array
    _idx: int

    def __init__(
        self,
        left_padding: list[int],
        key_format: Format | str | None = DEFAULT_FORMAT,
        value_format: Format | str | None = "same",
    ) -> None:
        super().__init__(key_format, value_format)
        self.left_padding = mx.array(left_padding)
        self.offset = mx.array([-n for n in left_padding])
        self._idx = 0  # where the next rows go

    def _add_left_padding(self, left_padding: list[int]) -> None:
        if self.rows is not None:
            raise ValueError(f"left padding can only be added to an empty {type(self).__qualname__}")
        added = mx.array(left_padding)
        self.left_padding = self.left_padding + added
        self.offset = self.offset - added

    @staticmethod
    def _end(counters: dict[str, Any]) -> int:
        return int(counters["_idx"])

    def _fill(self, caches: list[Any], single: type[QuantizedCache]) -> None:
        """Take in what ``caches`` hold, each one sequence of the length that the left padding leaves for it."""
        for cache in caches:
            if not isinstance(cache, single):
                raise TypeError(f"a batch of {single.__qualname__} has no place for {type(cache).__qualname__}")
            self._share_layout(cache)
        set_tag(self, tag_of(caches[0]))
        lengths = [cache.size() for cache in caches]
        longest = max(lengths)
        if longest == 0:
            return
        rows = [cache.rows_in_time(count) if count else None for cache, count in zip(caches, lengths)]
        like = next(x for x in rows if x is not None)
        self.rows = stack([_lead_in(x, like, longest) for x in rows])
        self.offset = mx.array([cache.offset for cache in caches])
        self._idx = longest

    def _extend(self, other: Any) -> None:
        """Add the sequences of ``other``, so that all end at the same row."""
        self._share_layout(other)
        last = max(self._idx, other._idx)
        filled = [cache.rows for cache in (self, other) if cache.rows is not None]
        if filled:
            length = max(map(capacity, filled))
            self.rows = stack([_aligned(cache, filled[0], last, length) for cache in (self, other)])
        self.left_padding = mx.concatenate(
            [self.left_padding + (last - self._idx), other.left_padding + (last - other._idx)]
        )
        self.offset = mx.concatenate([self.offset, other.offset])
        self._idx = last

    def _share_layout(self, other: QuantizedCache) -> None:
        """Store rows as ``other`` does, which must be how this cache does or would."""
        layout = self._layout or other._layout
        if layout is None:
            return
        if not _layout_like(self, layout) == layout == _layout_like(other, layout):
            formats = [f"{cache.key_format} keys and {cache.value_format} values" for cache in (self, other)]
            raise ValueError(f"no batch of caches that store rows differently: {formats[0]}, and {formats[1]}")
        self._set_layout(layout)


def _layout_like(cache: QuantizedCache, layout: Layout) -> Layout:
    """The layout of ``cache``, or that which it would have for rows like those of ``layout``."""
    if cache._layout is not None:
        return cache._layout
    keys, values = layout.keys, layout.values
    return Layout(
        fit_codec(cache.key_format, keys.dim, keys.dtype), fit_codec(cache.value_format, values.dim, values.dtype)
    )


def _lead_in(rows: Rows | None, like: Rows, length: int) -> Rows:
    """One sequence with as much padding before it as makes ``length`` rows."""
    return allocate(like, length) if rows is None else pad(rows, length - capacity(rows), 0)


def _aligned(cache: BatchQuantizedCache, like: Rows, last: int, length: int) -> Rows:
    """The rows of ``cache`` in buffers of ``length`` rows in which the next one goes to ``last``."""
    if cache.rows is None:
        return [mx.zeros((cache.offset.size, x.shape[1], length, x.shape[3]), x.dtype) for x in like]
    before = last - cache._idx
    kept = min(capacity(cache.rows), length - before)
    return pad(select(cache.rows, 0, kept), before, length - before - kept)
