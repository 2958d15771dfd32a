"""A quantized batch cache and its unquantized twin, given the same operations and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from hypothesis import strategies as st

from tests.qsdpa_patch.caches.twins import Rows, Twins, assert_same, saved_and_loaded

_COUNTS = st.integers(0, 12)

BATCH_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 14)),
        st.tuples(st.just("update"), st.just(1)),
        st.tuples(st.just("trim"), st.integers(0, 10)),
        st.tuples(st.just("right_padded"), st.lists(st.integers(1, 12), min_size=8, max_size=8)),
        st.tuples(st.just("filter"), st.lists(st.booleans(), min_size=8, max_size=8)),
        st.tuples(st.just("extend"), st.lists(_COUNTS, min_size=1, max_size=3)),
        st.just(("extract", 0)),
        st.just(("reload", 0)),
        st.just(("copy", 0)),
    ),
    min_size=3,
    max_size=12,
)
"""Operations of a batch cache, as ``(name, argument)``. Lists are longer than any batch gets; the rest is unused."""

MAX_BATCH = 8


@dataclass
class BatchTwins(Twins):
    """``cache`` and ``twin`` hold ``size`` sequences.

    make: a pair of empty caches of one sequence.
    """

    make: Callable[[], tuple[Any, Any]]

    @property
    def size(self) -> int:
        return int(self.twin.left_padding.size)

    @classmethod
    def merged(cls, make: Callable[[], tuple[Any, Any]], rows: Rows, counts: list[int]) -> BatchTwins:
        """A batch of sequences of ``counts`` rows each."""
        pairs = [_filled(make, rows, count) for count in counts]
        cache, twin = (type(members[0]).merge(list(members)) for members in zip(*pairs))
        return cls(cache, twin, rows, make)

    def run(self, operations: list[tuple[str, Any]], folder: Path) -> None:
        self.compare()
        for name, argument in operations:
            if name == "reload":
                self.cache = saved_and_loaded(self.cache, folder / "cache.safetensors")
            else:
                getattr(self, name)(*([] if name in ("copy", "extract") else [argument]))
            self.compare()

    def update(self, count: int) -> None:
        keys, values = self.rows.draw(count, self.size)
        fetched = self.cache.update_and_fetch(keys, values)
        self.compare_rows(fetched, self.twin.update_and_fetch(*self.rows.as_stored(keys, values)))

    def trim(self, count: int) -> None:
        """Trim, but not into the padding: no sequence has less than nothing."""
        offsets: Any = self.twin.offset.tolist()
        super().trim(max(0, min(count, *offsets)))

    def copy(self) -> None:
        self.rows = replace(self.rows, kind=replace(self.rows.kind, batch=self.size))
        super().copy()

    def right_padded(self, lengths: list[int]) -> None:
        """Rows of different lengths, padded on the right, in two updates."""
        lengths = lengths[: self.size]
        longest = max(lengths)
        padding = [longest - n for n in lengths]
        for cache in (self.cache, self.twin):
            cache.prepare(lengths=lengths, right_padding=padding)
        if longest >= 4:  # rotating caches take no single row here
            self.update(longest - 2)
            self.update(2)
        else:
            self.update(max(2, longest))
        for cache in (self.cache, self.twin):
            cache.finalize()

    def filter(self, chosen: list[bool]) -> None:
        indices = [i for i in range(self.size) if chosen[i]] or [0]
        self.cache.filter(indices)
        self.twin.filter(indices)

    def extend(self, counts: list[int]) -> None:
        if self.size + len(counts) <= MAX_BATCH:
            other = BatchTwins.merged(self.make, self.rows, counts)
            self.cache.extend(other.cache)
            self.twin.extend(other.twin)

    def extract(self) -> None:
        if self.twin.empty():
            return
        for i in range(self.size):
            one, twin = self.cache.extract(i), self.twin.extract(i)
            Twins(one, twin, self.rows).compare()

    def compare(self) -> None:
        assert_same(self.cache.left_padding, self.twin.left_padding)
        super().compare()

    def compare_values(self, actual: mx.array, expected: mx.array) -> None:
        """Rows of padding may differ: what rolls into them depends on the length of the buffers."""
        assert actual.shape == expected.shape
        is_row = self._is_row(expected.shape[2])
        assert_same(mx.where(is_row, actual, 0), mx.where(is_row, expected, 0))

    def _is_row(self, count: int) -> mx.array:
        """Which of the stored rows ``[B, 1, count, 1]`` are no padding."""
        position = mx.arange(count)
        if getattr(self.twin, "rotated", False):
            position = (position - self.twin._idx) % count
        left_padding: mx.array = self.twin.left_padding
        return position[:, None] >= left_padding[:, None, None, None]


def _filled(make: Callable[[], tuple[Any, Any]], rows: Rows, count: int) -> tuple[Any, Any]:
    """Two single caches with the same ``count`` rows."""
    cache, twin = make()
    if count:
        keys, values = rows.draw(count, 1)
        cache.update_and_fetch(keys, values)
        twin.update_and_fetch(*rows.as_stored(keys, values))
    return cache, twin
