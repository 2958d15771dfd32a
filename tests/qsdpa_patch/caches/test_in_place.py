"""Rows that a kernel writes into a cache's buffers: when it may, and what of the cache stays as it was.

A function that writes through NumPy, at once, stands for the kernel: CPUs have none. ``tests/gpu`` has CUDA's.
"""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qsdpa_patch.caches import (
    BatchQuantizedKVCache,
    QuantizedChunkedKVCache,
    QuantizedKVCache,
)
from qsdpa_patch.caches import codec as codec_module
from qsdpa_patch.caches import packed_rows as packed_rows_module
from qsdpa_patch.callers import TAKES_STACK_MEMBERS
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.pending_rows import RowWriter
from qsdpa_patch.kernels.row_quantization import quantize_rows
from tests.in_place_walks import CACHES, DIM, HEADS, Walk

FOUR = Format.affine(4)


@pytest.fixture(autouse=True)
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts a writer into the place of the kernels', and gives where its writes ended."""
    stops: list[int] = []

    def row_writer(sides: list[mx.array], format: Format) -> RowWriter:
        def write(sides: list[mx.array], buffers: list[mx.array], stop: int, after: mx.array | None) -> mx.array:
            new = quantize_rows(sides, format)
            mx.eval(new, buffers)
            for buffer, x in zip(buffers, new, strict=True):
                np.asarray(buffer, copy=False)[:, :, stop - x.shape[2] : stop] = np.asarray(x)
            stops.append(stop)
            return mx.zeros((1,))

        return write

    monkeypatch.setattr(codec_module, "row_writer", row_writer)
    return stops


def packed_rows(queries: mx.array, keys: Any, values: Any, **_: Any) -> mx.array:
    """In the place of attention: the packed rows, read as a kernel reads them."""
    stack = keys.stack
    if stack.pending is not None:
        assert stack.pending.token.shape == (1,)
    return mx.concatenate([x.view(mx.uint8)[:, :, : stack.rows].flatten() for x in stack.buffers])


setattr(packed_rows, TAKES_STACK_MEMBERS, packed_rows)
scaled_dot_product_attention = packed_rows


def attend(cache: Any, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    keys, values = cache.update_and_fetch(keys, values)
    return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0)


def needs_arrays(cache: Any, keys: mx.array, values: mx.array) -> mx.array:
    keys, values = cache.update_and_fetch(keys, values)
    return keys + values


def rows(count: int, batch: int = 1) -> mx.array:
    return mx.random.normal((batch, HEADS, count, DIM)).astype(mx.float16)


def append(cache: Any, count: int = 1, batch: int = 1) -> mx.array:
    return attend(cache, rows(count, batch), rows(count, batch), rows(count, batch))


@pytest.fixture
def cache(writes: list[int], monkeypatch: pytest.MonkeyPatch) -> QuantizedKVCache:
    """A cache of 101 rows, the last of them written in place."""
    monkeypatch.setattr(packed_rows_module, "STEP", 256)
    cache = QuantizedKVCache(FOUR)
    append(cache, 100)
    append(cache)
    assert writes == [101]
    return cache


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", CACHES)
def test_random_walks(kind: str, seed: int) -> None:
    walk = Walk(attend, mx.float16, seed, batch=2 if kind == "batch" else 1)
    walk.run(CACHES[kind], 120)
    assert walk.in_place > 10
    assert all(mx.array_equal(actual, wanted) for actual, wanted in walk.attended)


def test_a_chunked_cache_writes_where_its_rows_end(writes: list[int]) -> None:
    cache = QuantizedChunkedKVCache(40, FOUR)
    for _ in range(300):
        cache.maybe_trim_front()
        append(cache)
    assert len(writes) > 200
    assert max(writes) <= cache._capacity < 300  # its rows move to the front of new buffers now and then


def test_rows_that_others_may_have_read_are_not_written_in_place(cache: QuantizedKVCache, writes: list[int]) -> None:
    cache.trim(5)
    append(cache, 5)
    assert writes == [101]  # MLX wrote these, to arrays whose rows from 101 on are spare
    append(cache)
    assert writes == [101, 102]


def test_a_copy_writes_to_buffers_of_its_own(cache: QuantizedKVCache, writes: list[int]) -> None:
    other = copy.deepcopy(cache)
    before = [x[:, :, :101] for x in other.rows or []]
    append(cache)
    append(other)
    assert writes == [101, 102]
    append(other)
    assert writes == [101, 102, 103]
    assert all(mx.array_equal(x, y[:, :, :101]) for x, y in zip(before, cache.rows or []))
    assert not mx.array_equal((cache.rows or [])[0][:, :, 101], (other.rows or [])[0][:, :, 101])


def test_a_shallow_copy_has_no_spare_rows_either(cache: QuantizedKVCache, writes: list[int]) -> None:
    append(copy.copy(cache))
    assert writes == [101]


def test_buffers_that_came_from_elsewhere_have_no_spare_rows(cache: QuantizedKVCache, writes: list[int]) -> None:
    other = QuantizedKVCache(FOUR)
    append(other, 100)
    append(other)
    buffers, *counters = cache.state
    other.state = ([x[:] for x in buffers], *counters)
    append(cache)
    before = [mx.contiguous(x[:, :, :102]) for x in cache.rows or []]
    mx.eval(before)
    append(other)
    assert writes == [101, 101, 102]
    assert all(mx.array_equal(x, y[:, :, :102]) for x, y in zip(before, cache.rows or []))


def test_full_buffers_grow(cache: QuantizedKVCache, writes: list[int]) -> None:
    full = cache._capacity
    for _ in range(full - 101 + 2):
        append(cache)
    assert full in writes
    assert writes[-1] == full + 2
    assert full + 1 not in writes


def test_functions_that_need_arrays_get_them_from_mlx(cache: QuantizedKVCache, writes: list[int]) -> None:
    needs_arrays(cache, rows(1), rows(1))
    assert writes == [101]


def test_many_rows_are_written_by_mlx(cache: QuantizedKVCache, writes: list[int]) -> None:
    append(cache, 17)
    assert writes == [101]
    append(cache, 16)
    assert writes == [101, 134]


def test_where_attention_waits_for_so_many_rows_mlx_writes_them(cache: QuantizedKVCache, writes: list[int]) -> None:
    append(cache, 3)
    assert cache._pending is not None
    cache._pending.then(cache._rows or [])  # as a route does that takes arrays
    append(cache, 3)
    assert writes == [101, 104]
    append(cache, 2)
    assert writes == [101, 104, 109]


def test_keys_and_values_of_different_formats_are_written_by_mlx(writes: list[int]) -> None:
    cache = QuantizedKVCache(Format.affine(8), FOUR)
    append_to = [rows(1), rows(1)]
    for _ in range(3):
        keys, values = cache.update_and_fetch(*append_to)
    assert (keys.shape, values.shape, writes) == ((1, HEADS, 3, DIM), (1, HEADS, 3, DIM), [])


def test_rows_of_another_dtype_are_written_by_mlx(cache: QuantizedKVCache, writes: list[int]) -> None:
    x = rows(1).astype(mx.float32)
    attend(cache, x, x, x)
    assert writes == [101]


def test_new_rows_of_another_shape_are_refused(cache: QuantizedKVCache, writes: list[int]) -> None:
    x = rows(1)[..., :32]
    with pytest.raises(ValueError, match=r"this cache takes \[batch, heads, count, 64\]"):
        attend(cache, x, x, x)
    assert (cache.offset, writes) == (101, [101])


@pytest.mark.parametrize(("batch", "heads"), [(2, HEADS), (1, HEADS + 1), (1, 1)])
def test_new_rows_that_the_buffers_have_no_place_for(
    cache: QuantizedKVCache, writes: list[int], batch: int, heads: int
) -> None:
    """No kernel may write beyond the buffers: MLX gets such rows, and says what is wrong or broadcasts them."""
    x = mx.random.normal((batch, heads, 1, DIM)).astype(mx.float16)
    with contextlib.suppress(ValueError):
        attend(cache, x, x, x)
    assert writes == [101]


def test_the_buffers_wait_for_what_was_written(cache: QuantizedKVCache) -> None:
    """Reading them runs the kernel, and leaves the spare rows spare."""
    assert cache._pending is not None
    buffers = cache.rows
    assert cache._pending is None
    assert cache._spare is not None
    assert cache._spare.hold(1, 2 * HEADS, 101, 102)
    assert cache.state[0] is buffers


@pytest.mark.parametrize("seed", range(6))
def test_batches_whose_sequences_come_and_go(seed: int, writes: list[int]) -> None:
    """Rows of sequences that were taken out, put together or dropped are those of a batch that MLX alone writes to."""
    choose = random.Random(seed)
    mx.random.seed(seed)

    def twins(batch: int, count: int) -> list[BatchQuantizedKVCache]:
        pair = [BatchQuantizedKVCache(list(range(batch)), FOUR) for _ in range(2)]
        pair[1]._most_in_place = 0
        grow(pair, batch, count)
        return pair

    def grow(pair: list[Any], batch: int, count: int) -> None:
        new = rows(count, batch), rows(count, batch), rows(count, batch)
        first, second = (attend(cache, *new) for cache in pair)
        assert mx.array_equal(first, second)

    batch, pair = 3, twins(3, 9)
    taken: list[list[Any]] = []
    for _ in range(60):
        kind = choose.choice(["append"] * 6 + ["filter", "extend", "extract"])
        if kind == "filter" and batch > 1:
            kept = sorted(choose.sample(range(batch), batch - 1))
            batch -= 1
            for cache in pair:
                cache.filter(kept)
        elif kind == "extend" and batch < 5:
            for cache, other in zip(pair, twins(2, choose.randint(3, 20)), strict=True):
                cache.extend(other)
            batch += 2
        elif kind == "extract":
            index = choose.randrange(batch)
            taken.append([cache.extract(index) for cache in pair])
            taken[-1][1]._most_in_place = 0
        else:
            grow(pair, batch, choose.choice([1, 1, 1, 3]))
            for single in taken[-2:]:
                grow(single, 1, 1)
    assert len(writes) > 30
    for first, second in [pair, *taken]:
        stop = first._span()[1]
        for x, y in zip(first.rows or [], second.rows or [], strict=True):
            assert mx.array_equal(x[:, :, :stop].view(mx.uint8), y[:, :, :stop].view(mx.uint8))
