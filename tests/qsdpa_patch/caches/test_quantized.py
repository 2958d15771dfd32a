"""QuantizedKVCache against KVCache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache
from mlx_lm.models.cache import QuantizedKVCache as StockQuantizedKVCache

from qsdpa_patch.caches import (
    QuantizedChunkedKVCache,
    QuantizedKVCache,
    QuantizedLatentCache,
    QuantizedRotatingKVCache,
    packed_rows,
)
from qsdpa_patch.kernels.format import AFFINE_BITS, Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, quantize
from qsdpa_patch.latent_rope import RopeKeys
from tests.qsdpa_patch.caches.twins import OPERATIONS, Kind, Rows, Twins, assert_same, kinds, saved_and_loaded


@settings(max_examples=200, derandomize=True, deadline=None)
@given(kind=kinds(), operations=OPERATIONS)
def test_it_behaves_as_its_twin(
    kind: Kind, operations: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    twins = Twins(QuantizedKVCache(kind.key_format, kind.value_format), KVCache(), Rows(kind))
    twins.run(operations, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("dim", [32, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_nbytes_is_what_the_format_says(bits: int, dim: int) -> None:
    cache = QuantizedKVCache(Format.affine(bits))
    assert cache.nbytes == 0
    rows = Rows(Kind(key_dim=dim, value_dim=dim, dtype=mx.float16))
    for count in (8, 1, 9, 1):
        cache.update_and_fetch(*rows.draw(count))
    format, padded = Format.affine(bits).fit(dim)
    assert cache.rows is not None
    capacity = cache.rows[0].shape[2]
    assert capacity >= 19
    assert cache.key_format == cache.value_format == format
    assert cache.nbytes == 2 * 2 * capacity * format.row_bytes(padded)


@pytest.mark.parametrize("count", [1, 5, 300])
def test_buffers_hold_at_most_an_eighth_and_a_step_more_than_needed(count: int) -> None:
    cache = QuantizedKVCache()
    rows = Rows(Kind(Format.affine(8), Format.affine(8)))
    for _ in range(300 // count):
        cache.update_and_fetch(*rows.draw(count))
        assert cache.rows is not None
        assert cache.offset <= cache.rows[0].shape[2] < cache.offset * 9 / 8 + packed_rows.STEP


@settings(max_examples=40, derandomize=True, deadline=None)
@given(kind=kinds(), before=st.integers(0, 20), trimmed=st.integers(0, 5), operations=OPERATIONS)
def test_from_cache_quantizes_what_the_twin_holds(
    kind: Kind,
    before: int,
    trimmed: int,
    operations: list[tuple[str, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rows, twin, stored = Rows(kind), KVCache(), KVCache()
    if before:
        keys, values = rows.draw(before)
        twin.update_and_fetch(keys, values)
        stored.update_and_fetch(*rows.as_stored(keys, values))
        twin.trim(trimmed)
        stored.trim(trimmed)
    cache = QuantizedKVCache.from_cache(twin, kind.key_format, kind.value_format)
    Twins(cache, stored, rows).run(operations, tmp_path_factory.getbasetemp())


def test_from_cache_leaves_the_original_alone() -> None:
    kind = Kind(Format.affine(8), None)
    rows, twin = Rows(kind), KVCache()
    twin.update_and_fetch(*rows.draw(4))
    before = [mx.array(x) for x in twin.keys_and_values()]
    cache = QuantizedKVCache.from_cache(twin, kind.key_format, None)
    cache.trim(2)
    cache.update_and_fetch(*rows.draw(2))
    for x, expected in zip(twin.keys_and_values(), before):
        assert_same(x, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_from_a_stock_quantized_cache_takes_its_arrays_over(bits: int) -> None:
    format = Format.affine(bits, 32)
    rows, stock = Rows(Kind(format, format)), StockQuantizedKVCache(group_size=32, bits=bits)
    for count in (5, 1):
        keys, values = stock.update_and_fetch(*rows.draw(count))
    cache = QuantizedKVCache.from_cache(stock, format)
    fetched = cache.keys_and_values()
    for ours, theirs in zip(fetched, (keys, values)):
        assert isinstance(ours, QuantizedTensor)
        for part, expected in zip(ours.parts, theirs):
            assert_same(part, expected)
    more = rows.draw(3)
    cache.trim(2)
    cache.update_and_fetch(*more)
    for part, expected in zip(stock.keys_and_values()[0], keys):
        assert_same(part, expected)
    assert_same(cache.update_and_fetch(*more)[0].shape[2], 10)


def test_from_a_stock_quantized_cache_of_another_format() -> None:
    rows, stock = Rows(Kind(dtype=mx.float16)), StockQuantizedKVCache(group_size=64, bits=8)
    keys, values = rows.draw(6)
    stock.update_and_fetch(keys, values)
    cache = QuantizedKVCache.from_cache(stock, Format.affine(8), None)
    ours_keys, ours_values = cache.keys_and_values()
    assert_same(ours_keys, quantize(keys, Format.affine(8)).dequantize())
    assert not isinstance(ours_values, QuantizedTensor)
    assert_same(ours_values, quantize(values, Format.affine(8)).dequantize())
    empty = QuantizedKVCache.from_cache(StockQuantizedKVCache(), "mxfp4")
    assert empty.empty()
    assert empty.key_format == Format.named("mxfp4")


@pytest.mark.parametrize("cache", [QuantizedKVCache(), QuantizedRotatingKVCache(8), QuantizedChunkedKVCache(8)])
def test_what_was_fetched_stays_as_it_was(cache: Any) -> None:
    """The buffers are written in place, but whoever still holds rows of an earlier step keeps them."""
    rows = Rows(Kind())
    cache.update_and_fetch(*rows.draw(7))
    fetched, _ = cache.update_and_fetch(*rows.draw(1))
    before = [mx.array(part) for part in fetched.parts]
    mx.eval(before)
    cache.trim(1)
    for _ in range(3):
        cache.update_and_fetch(*rows.draw(1))
    for part, expected in zip(fetched.parts, before):
        assert_same(part, expected)


def test_values_without_numbers_are_kept_as_they_are(tmp_path: Path) -> None:
    """An indexer's cache has keys only: its values have 0 numbers a row."""
    cache = QuantizedKVCache()
    keys = mx.random.normal((1, 1, 3, 64))
    cache.update_and_fetch(keys, mx.zeros((1, 1, 3, 0)))
    cache = saved_and_loaded(cache, tmp_path / "cache.safetensors")
    fetched, values = cache.update_and_fetch(keys, mx.zeros((1, 1, 3, 0)))
    assert fetched.shape == (1, 1, 6, 64)
    assert values.shape == (1, 1, 6, 0)


def test_models_may_replace_the_keys_by_ones_that_depend_on_something() -> None:
    kind = Kind()
    twins = Twins(QuantizedKVCache(kind.key_format, kind.value_format), KVCache(), Rows(kind))
    for _ in range(12):
        twins.update(1)
        twins.cache.keys = mx.depends(twins.cache.keys, mx.zeros(3))
        twins.compare()


def test_other_code_never_takes_it_for_a_stock_quantized_cache() -> None:
    cache = QuantizedKVCache()
    cache.update_and_fetch(*Rows(Kind()).draw(2))
    assert not hasattr(cache, "bits")
    assert not hasattr(cache, "to_quantized")  # mlx-lm would call it after every token
    assert not isinstance(cache, StockQuantizedKVCache)


def test_rows_in_another_dtype_are_stored_in_that_of_the_first() -> None:
    cache = QuantizedKVCache()
    rows = Rows(Kind(dtype=mx.float16))
    cache.update_and_fetch(*rows.draw(3))
    keys, values = (x.astype(mx.float32) for x in rows.draw(3))
    fetched = cache.update_and_fetch(keys, values)
    assert [x.dtype for x in fetched] == [mx.float16, mx.float16]


@pytest.mark.parametrize("rows", [(1, 2, 1, 48), (1, 2, 1, 128)])
def test_rows_that_do_not_fit_change_nothing(rows: tuple[int, ...]) -> None:
    kind = Kind()
    twins = Twins(QuantizedKVCache(kind.key_format, kind.value_format), KVCache(), Rows(kind))
    twins.update(3)
    with pytest.raises(ValueError):
        twins.cache.update_and_fetch(mx.zeros(rows), mx.zeros(rows))
    twins.compare()


def test_keys_and_values_of_different_heads_or_lengths_are_refused() -> None:
    cache = QuantizedKVCache()
    for shape in ((1, 4, 3, 64), (1, 2, 2, 64), (2, 2, 3, 64)):
        with pytest.raises(ValueError, match="differ in batch, heads or count"):
            cache.update_and_fetch(mx.zeros((1, 2, 3, 64)), mx.zeros(shape))
    assert cache.empty()


def test_what_is_quantized_alike_shares_two_buffers() -> None:
    """One write to each is all that a step costs; rows of a head stay next to each other."""
    alike, mixed = QuantizedKVCache(Format.affine(4)), QuantizedKVCache(Format.affine(8), Format.affine(4))
    latent = QuantizedLatentCache(Format.affine(4))
    for cache, buffers in ((alike, 2), (mixed, 4), (latent, 3)):
        keys, values = cache.update_and_fetch(*Rows(Kind(key_dim=64, value_dim=64, dtype=mx.float16)).draw(3))
        assert len(cache.rows or ()) == buffers
        stack = getattr(keys, "stack", None)
        assert (stack is not None and stack is getattr(values, "stack", None)) == (cache is alike)


@pytest.mark.parametrize(("format", "error"), [("int4", ValueError), (4, TypeError)])
def test_a_format_that_there_is_not(format: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        QuantizedKVCache(format)
    with pytest.raises(error):
        QuantizedKVCache(Format.affine(4), format)


def test_integer_rows_are_refused() -> None:
    cache = QuantizedKVCache()
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        cache.update_and_fetch(mx.zeros((1, 1, 1, 64), mx.int32), mx.zeros((1, 1, 1, 64)))
    assert cache.empty()


def test_an_empty_cache_has_no_rows_to_give() -> None:
    with pytest.raises(ValueError, match="QuantizedKVCache is empty"):
        QuantizedKVCache().keys_and_values()


def test_latents_are_quantized_and_rope_keys_are_not() -> None:
    cache = QuantizedLatentCache(Format.affine(4))
    kind = Kind(Format.affine(4), None, 256, 64, mx.bfloat16, heads=1)
    twins = Twins(cache, KVCache(), Rows(kind))
    for count in (9, 1, 1, 17):
        twins.update(count)
        twins.compare()
    twins.trim(4)
    twins.compare()
    assert isinstance(cache.keys_and_values()[1], RopeKeys)
    converted = QuantizedLatentCache.from_cache(twins.twin, Format.affine(4))
    assert converted.value_format is None
    assert_same(converted.keys_and_values()[1], twins.twin.keys_and_values()[1])
