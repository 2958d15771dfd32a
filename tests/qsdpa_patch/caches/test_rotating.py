"""QuantizedRotatingKVCache against RotatingKVCache."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import RotatingKVCache

from qsdpa_patch.caches import QuantizedRotatingKVCache
from qsdpa_patch.kernels.format import Format
from tests.qsdpa_patch.caches.twins import OPERATIONS, Kind, Rows, Twins, assert_same, kinds


@settings(max_examples=200, derandomize=True, deadline=None)
@given(kind=kinds(), max_size=st.integers(5, 30), keep=st.integers(0, 4), operations=OPERATIONS)
def test_it_behaves_as_its_twin(
    kind: Kind,
    max_size: int,
    keep: int,
    operations: list[tuple[str, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cache = QuantizedRotatingKVCache(max_size, keep, kind.key_format, kind.value_format)
    twins = Twins(cache, RotatingKVCache(max_size, keep), Rows(kind))
    twins.run(operations, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("keep", [0, 4])
def test_single_rows_wrap_around(keep: int) -> None:
    kind = Kind()
    cache = QuantizedRotatingKVCache(20, keep, kind.key_format, kind.value_format)
    twins = Twins(cache, RotatingKVCache(20, keep), Rows(kind))
    twins.update(7)
    for _ in range(50):
        twins.update(1)
        twins.compare()
    assert cache.rows is not None
    assert cache.rows[0].shape[2] == 20


@settings(max_examples=60, derandomize=True, deadline=None)
@given(keep=st.integers(0, 4), before=OPERATIONS, after=OPERATIONS)
def test_from_cache_goes_on_where_the_twin_was(
    keep: int, before: list[tuple[str, int]], after: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = Kind(value_format=None, value_dim=32)
    rows, twin, stored = Rows(kind), RotatingKVCache(16, keep), RotatingKVCache(16, keep)
    for name, count in before:
        if name == "update":
            keys, values = rows.draw(count)
            twin.update_and_fetch(keys, values)
            stored.update_and_fetch(*rows.as_stored(keys, values))
        elif name == "trim" and twin.is_trimmable():
            twin.trim(count)
            stored.trim(count)
    cache = QuantizedRotatingKVCache.from_cache(twin, kind.key_format, kind.value_format)
    Twins(cache, stored, rows).run(after, tmp_path_factory.getbasetemp())


def test_a_long_first_update_is_seen_whole() -> None:
    kind = Kind()
    cache = QuantizedRotatingKVCache(8, 0, kind.key_format, kind.value_format)
    twins = Twins(cache, RotatingKVCache(8), Rows(kind))
    twins.update(30)
    keys, _ = cache.keys_and_values()
    assert keys.shape[2] == 30
    twins.update(1)
    assert cache.keys_and_values()[0].shape[2] == 8


def test_all_updates_are_in_place_until_rows_are_dropped() -> None:
    """Chunks of a prompt, and the drafts of speculative decoding with their trims, grow the buffers once in a while."""
    kind = Kind()
    cache = QuantizedRotatingKVCache(1000, 4, kind.key_format, kind.value_format)
    twins = Twins(cache, RotatingKVCache(1000, 4), Rows(kind))
    lengths = set()
    for _ in range(100):
        twins.update(5)
        twins.trim(2)
        assert cache.rows is not None
        lengths.add(cache.rows[0].shape[2])
    twins.compare()
    assert len(lengths) <= 30
    assert max(lengths) <= 1000


def test_buffers_never_exceed_max_size_when_rows_come_one_by_one() -> None:
    cache = QuantizedRotatingKVCache(11, key_format=Format.affine(8))
    rows = Rows(Kind(Format.affine(8), Format.affine(8)))
    for _ in range(30):
        cache.update_and_fetch(*rows.draw(1))
        assert cache.rows is not None
        assert cache.rows[0].shape[2] <= 11
    assert_same(cache.size(), 11)
