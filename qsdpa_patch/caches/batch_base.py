"""What the batch caches share."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qsdpa_patch.caches.base import DEFAULT_FORMAT, QuantizedCache
from qsdpa_patch.caches.codec import Codec, fit_codec
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
        if self.keys is not None:
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
            self._share_codecs(cache)
        set_tag(self, tag_of(caches[0]))
        lengths = [cache.size() for cache in caches]
        longest = max(lengths)
        if longest == 0:
            return
        rows = [cache.rows_in_time(count) if count else None for cache, count in zip(caches, lengths)]
        like_keys, like_values = next(pair for pair in rows if pair is not None)
        self.keys = stack([_lead_in(pair and pair[0], like_keys, longest) for pair in rows])
        self.values = stack([_lead_in(pair and pair[1], like_values, longest) for pair in rows])
        self.offset = mx.array([cache.offset for cache in caches])
        self._idx = longest

    def _extend(self, other: Any) -> None:
        """Add the sequences of ``other``, so that all end at the same row."""
        self._share_codecs(other)
        last = max(self._idx, other._idx)
        filled = [cache for cache in (self, other) if cache.keys is not None]
        if filled:
            length = max(capacity(cache._buffers()[0]) for cache in filled)
            like = filled[0]
            self.keys, self.values = (
                stack(
                    [
                        _aligned(getattr(cache, side), getattr(like, side), cache, last, length)
                        for cache in (self, other)
                    ]
                )
                for side in ("keys", "values")
            )
        self.left_padding = mx.concatenate(
            [self.left_padding + (last - self._idx), other.left_padding + (last - other._idx)]
        )
        self.offset = mx.concatenate([self.offset, other.offset])
        self._idx = last

    def _share_codecs(self, other: QuantizedCache) -> None:
        """Store rows as ``other`` does, which must be how this cache does or would."""
        codecs = self._codecs or other._codecs
        if codecs is None:
            return
        if not _codecs_like(self, codecs) == codecs == _codecs_like(other, codecs):
            formats = [f"{cache.key_format} keys and {cache.value_format} values" for cache in (self, other)]
            raise ValueError(f"no batch of caches that store rows differently: {formats[0]}, and {formats[1]}")
        self._set_codecs(*codecs)


def _codecs_like(cache: QuantizedCache, codecs: tuple[Codec, Codec]) -> tuple[Codec, Codec]:
    """The codecs of ``cache``, or those that it would have for rows like those of ``codecs``."""
    if cache._codecs is not None:
        return cache._codecs
    keys, values = codecs
    return fit_codec(cache.key_format, keys.dim, keys.dtype), fit_codec(cache.value_format, values.dim, values.dtype)


def _lead_in(rows: Rows | None, like: Rows, length: int) -> Rows:
    """One sequence with as much padding before it as makes ``length`` rows."""
    return allocate(like, length) if rows is None else pad(rows, length - capacity(rows), 0)


def _aligned(rows: Rows | None, like: Rows, cache: BatchQuantizedCache, last: int, length: int) -> Rows:
    """``rows`` of ``cache`` as buffers of ``length`` rows in which the next one goes to ``last``."""
    if rows is None:
        return [mx.zeros((cache.offset.size, x.shape[1], length, x.shape[3]), x.dtype) for x in like]
    before = last - cache._idx
    kept = min(capacity(rows), length - before)
    return pad(select(rows, 0, kept), before, length - before - kept)
