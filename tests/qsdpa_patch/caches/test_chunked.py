"""QuantizedChunkedKVCache against ChunkedKVCache."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ChunkedKVCache

from qsdpa_patch.caches import QuantizedChunkedKVCache
from tests.qsdpa_patch.caches.twins import OPERATIONS, Kind, Rows, Twins, kinds


class ChunkedTwins(Twins):
    """Llama 4 drops old rows before each update."""

    def update(self, count: int) -> None:
        self.cache.maybe_trim_front()
        self.twin.maybe_trim_front()
        assert self.cache.start_position == self.twin.start_position
        super().update(count)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(kind=kinds(), chunk_size=st.integers(3, 30), operations=OPERATIONS)
def test_it_behaves_as_its_twin(
    kind: Kind, chunk_size: int, operations: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = QuantizedChunkedKVCache(chunk_size, kind.key_format, kind.value_format)
    twins = ChunkedTwins(cache, ChunkedKVCache(chunk_size), Rows(kind))
    twins.run(operations, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("before", [[], [4], [12, 1, 1]])
def test_from_cache_goes_on_where_the_twin_was(before: list[int], tmp_path: Path) -> None:
    kind = Kind()
    rows, twin, stored = Rows(kind), ChunkedKVCache(8), ChunkedKVCache(8)
    for count in before:
        keys, values = rows.draw(count)
        for cache, new in ((twin, (keys, values)), (stored, rows.as_stored(keys, values))):
            cache.maybe_trim_front()
            cache.update_and_fetch(*new)
    quantized = QuantizedChunkedKVCache.from_cache(twin, kind.key_format, kind.value_format)
    operations = [("update", 3), ("reload", 0), ("trim", 2), *[("update", 1)] * 12]
    ChunkedTwins(quantized, stored, rows).run(operations, tmp_path)


def test_old_rows_leave_without_a_copy() -> None:
    """A full cache makes room only once in a while, and its buffers do not grow."""
    cache = QuantizedChunkedKVCache(256)
    rows = Rows(Kind())
    cache.update_and_fetch(*rows.draw(256))
    moves, lengths = 0, set()
    for _ in range(300):
        cache.maybe_trim_front()
        first = cache._first
        cache.update_and_fetch(*rows.draw(1))
        moves += cache._first < first
        assert cache.rows is not None
        lengths.add(cache.rows[0].shape[2])
    assert moves <= 300 / (256 / 8) + 1
    assert max(lengths) <= 257 * 9 / 8 + 8
