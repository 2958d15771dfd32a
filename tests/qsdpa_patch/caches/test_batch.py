"""The batch caches against BatchKVCache and BatchRotatingKVCache."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

from qsdpa_patch.caches import (
    BatchQuantizedKVCache,
    BatchQuantizedLatentCache,
    BatchQuantizedRotatingKVCache,
    QuantizedKVCache,
    QuantizedLatentCache,
    QuantizedRotatingKVCache,
    quantized,
)
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import quantize
from qsdpa_patch.latent_rope import RopeKeys
from qsdpa_patch.layer_tags import LayerTag, set_tag, tag_of
from tests.qsdpa_patch.caches.batch_twins import BATCH_OPERATIONS, BatchTwins
from tests.qsdpa_patch.caches.twins import Kind, Rows, assert_same, kinds

COUNTS = st.lists(st.integers(0, 20), min_size=1, max_size=4)
PADDING = st.lists(st.integers(0, 6), min_size=1, max_size=4)
Operations = list[tuple[str, Any]]


def growing(kind: Kind) -> tuple[Any, Any]:
    return QuantizedKVCache(kind.key_format, kind.value_format), KVCache()


def rotating(kind: Kind, max_size: int) -> tuple[Any, Any]:
    return QuantizedRotatingKVCache(max_size, 0, kind.key_format, kind.value_format), RotatingKVCache(max_size)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(kind=kinds(), counts=COUNTS, operations=BATCH_OPERATIONS)
def test_merged_caches_behave_as_their_twins(
    kind: Kind, counts: list[int], operations: Operations, tmp_path_factory: pytest.TempPathFactory
) -> None:
    twins = BatchTwins.merged(lambda: growing(kind), Rows(kind), counts)
    twins.run(operations, tmp_path_factory.getbasetemp())


@settings(max_examples=100, derandomize=True, deadline=None)
@given(kind=kinds(), max_size=st.integers(5, 20), counts=COUNTS, operations=BATCH_OPERATIONS)
def test_merged_rotating_caches_behave_as_their_twins(
    kind: Kind,
    max_size: int,
    counts: list[int],
    operations: Operations,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    twins = BatchTwins.merged(lambda: rotating(kind, max_size), Rows(kind), counts)
    twins.run(operations, tmp_path_factory.getbasetemp())


@settings(max_examples=30, derandomize=True, deadline=None)
@given(padding=PADDING, operations=BATCH_OPERATIONS)
def test_left_padded_caches_behave_as_their_twins(
    padding: list[int], operations: Operations, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = Kind()
    cache = BatchQuantizedKVCache(padding, kind.key_format, kind.value_format)
    twins = BatchTwins(cache, BatchKVCache(padding), Rows(kind), lambda: growing(kind))
    twins.update(7)
    twins.run(operations, tmp_path_factory.getbasetemp())


@settings(max_examples=30, derandomize=True, deadline=None)
@given(padding=PADDING, operations=BATCH_OPERATIONS)
def test_left_padded_rotating_caches_behave_as_their_twins(
    padding: list[int], operations: Operations, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = Kind()
    cache = BatchQuantizedRotatingKVCache(9, padding, kind.key_format, kind.value_format)
    twins = BatchTwins(cache, BatchRotatingKVCache(9, padding), Rows(kind), lambda: rotating(kind, 9))
    twins.update(7)
    twins.run(operations, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("max_size", [None, 9])
@pytest.mark.parametrize("updates", [[], [5], [5, 1], [5, 1, 1, 1, 1, 1, 1], [12, 3, 1]])
def test_from_cache_goes_on_where_the_twin_was(
    max_size: int | None, updates: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind, padding = Kind(batch=2), [0, 3]
    rows = Rows(kind)
    twin, stored = (
        BatchKVCache(padding) if max_size is None else BatchRotatingKVCache(max_size, padding) for _ in range(2)
    )
    for count in updates:
        keys, values = rows.draw(count)
        twin.update_and_fetch(keys, values)
        stored.update_and_fetch(*rows.as_stored(keys, values))
    twins = BatchTwins(
        quantized(twin, kind.key_format, kind.value_format),
        stored,
        rows,
        lambda: growing(kind) if max_size is None else rotating(kind, max_size),
    )
    later = [("update", 1), ("update", 1), ("extend", [4, 0]), ("right_padded", [5, 2, 3, 4]), ("extract", 0)]
    twins.run([*later, ("filter", [True, False, True, False]), ("update", 1)], tmp_path_factory.getbasetemp())


def test_from_cache_takes_pending_padding_over() -> None:
    kind = Kind(batch=2)
    rows, twin, stored = Rows(kind), BatchKVCache([0, 0]), BatchKVCache([0, 0])
    keys, values = rows.draw(6)
    for cache, new in ((twin, (keys, values)), (stored, rows.as_stored(keys, values))):
        cache.prepare(lengths=[6, 4], right_padding=[0, 2])
        cache.update_and_fetch(*new)
    cache = BatchQuantizedKVCache.from_cache(twin, kind.key_format, kind.value_format)
    cache.finalize()
    stored.finalize()
    BatchTwins(cache, stored, rows, lambda: growing(kind)).compare()


def test_a_copy_made_in_the_middle_of_padded_rows_can_be_finalized() -> None:
    kind = Kind(batch=2)
    rows, padding = Rows(kind), [0, 2]
    for cache in (BatchQuantizedKVCache([0, 0]), BatchQuantizedRotatingKVCache(9, [0, 0])):
        cache.prepare(lengths=[6, 4], right_padding=padding)
        cache.update_and_fetch(*rows.draw(6))
        twin = copy.deepcopy(cache)
        for each in (cache, twin):
            each.finalize()
        assert_same(twin.left_padding, mx.array(padding))
        assert_same(twin.keys_and_values()[0], cache.keys_and_values()[0])


def test_a_batch_of_empty_caches_is_empty() -> None:
    batch = QuantizedKVCache.merge([QuantizedKVCache("mxfp4"), QuantizedKVCache("mxfp4")])
    assert batch.empty()
    assert batch.nbytes == 0
    assert batch.extract(1).empty()
    batch.update_and_fetch(*Rows(Kind(batch=2)).draw(3))
    assert batch.key_format == Format.named("mxfp4")


def test_a_sequence_without_rows_can_be_taken_out_and_filled() -> None:
    rows = Rows(Kind(batch=2))
    pairs: list[list[Any]] = [
        [QuantizedKVCache(), QuantizedKVCache()],
        [QuantizedRotatingKVCache(5), QuantizedRotatingKVCache(5)],
    ]
    for singles in pairs:
        batch = singles[0].merge(singles)
        batch.update_and_fetch(*rows.draw(3))
        batch.trim(3)
        for count in (1, 2):
            one = batch.extract(0)
            assert one.offset == 0
            keys, values = rows.draw(count, batch=1)
            assert_same(one.update_and_fetch(keys, values)[0], quantize(keys, Format.affine(8)).dequantize())


def test_latents_stay_latents_in_a_batch() -> None:
    format = Format.affine(4)
    rows = Rows(Kind(format, None, 256, 64, heads=1))
    singles = [QuantizedLatentCache(format) for _ in range(3)]
    for count, cache in zip((4, 9), singles):
        cache.update_and_fetch(*rows.draw(count))
    batch = QuantizedLatentCache.merge(singles)
    assert type(batch) is BatchQuantizedLatentCache
    keys, values = batch.update_and_fetch(*rows.draw(1, batch=3))
    assert keys.shape == (3, 1, 10, 256)
    assert isinstance(values, RopeKeys)
    one = batch.extract(0)
    assert type(one) is QuantizedLatentCache
    assert one.offset == 5
    assert_same(one.keys_and_values()[1][:, :, :4], singles[0].keys_and_values()[1])
    stock = BatchKVCache([0, 0])
    stock.update_and_fetch(*rows.draw(2, batch=2))
    assert type(quantized(stock, format, latent=True)) is BatchQuantizedLatentCache


def test_a_batch_and_what_comes_out_of_it_know_their_layer() -> None:
    tag = LayerTag("llama", "llama", 3, "full")
    singles = [QuantizedKVCache(), QuantizedKVCache()]
    for cache in singles:
        cache.update_and_fetch(*Rows(Kind()).draw(2))
        set_tag(cache, tag)
    batch = QuantizedKVCache.merge(singles)
    assert tag_of(batch) == tag_of(batch.extract(1)) == tag_of(copy.deepcopy(batch)) == tag


def test_caches_that_make_no_batch_are_refused() -> None:
    rows = Rows(Kind())
    caches = [QuantizedKVCache(Format.affine(bits)) for bits in (4, 8)]
    for cache in caches:
        cache.update_and_fetch(*rows.draw(2))
    with pytest.raises(ValueError, match="no batch"):
        QuantizedKVCache.merge(caches)
    with pytest.raises(ValueError, match="no batch"):
        QuantizedKVCache.merge(caches[:1]).extend(QuantizedKVCache.merge(caches[1:]))
    with pytest.raises(ValueError, match="8-bit g64 keys and 8-bit g64 values, and 4-bit g64 keys"):
        QuantizedKVCache.merge([QuantizedKVCache(Format.affine(8)), caches[0]])
    with pytest.raises(TypeError, match="no place for KVCache"):
        QuantizedKVCache.merge([caches[0], KVCache()])
    sizes = [QuantizedRotatingKVCache(size) for size in (5, 6)]
    for one in sizes:
        one.update_and_fetch(*rows.draw(2))
    with pytest.raises(ValueError, match="sizes"):
        QuantizedRotatingKVCache.merge(sizes)


@pytest.mark.parametrize("batch", [BatchQuantizedKVCache([0, 1]), BatchQuantizedRotatingKVCache(8, [0, 1])])
def test_left_padding_comes_before_all_rows(batch: Any) -> None:
    batch.prepare(left_padding=[2, 0])
    assert batch.left_padding.tolist() == [2, 1]
    assert batch.offset.tolist() == [-2, -1]
    batch.update_and_fetch(*Rows(Kind()).draw(4, batch=2))
    with pytest.raises(ValueError, match="empty BatchQuantized"):
        batch.prepare(left_padding=[1, 1])


def test_a_rotating_batch_is_finalized_before_it_decodes() -> None:
    batch = BatchQuantizedRotatingKVCache(8, [0, 0])
    rows = Rows(Kind(batch=2))
    with pytest.raises(ValueError, match="lengths"):
        batch.prepare(right_padding=[0, 2])
    batch.prepare(lengths=[3, 1], right_padding=[0, 2])
    batch.update_and_fetch(*rows.draw(3))
    with pytest.raises(RuntimeError, match="finalize"):
        batch.update_and_fetch(*rows.draw(1))
    batch.finalize()
    batch.update_and_fetch(*rows.draw(1))
    assert batch.offset.tolist() == [4, 2]
