"""The CUDA kernel that quantizes new rows straight into a cache's buffers, and the caches that use it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import base

import qsdpa_patch
from qsdpa_patch.caches import (
    QuantizedChunkedKVCache,
    QuantizedKVCache,
)
from qsdpa_patch.dispatcher import make_dispatcher
from qsdpa_patch.kernels.cuda import backend
from qsdpa_patch.kernels.format import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_FORMATS, Format
from qsdpa_patch.kernels.row_kernel import Rows
from qsdpa_patch.kernels.row_writing import can_write_rows
from tests.in_place_walks import CACHES, DIM, HEADS, Walk

_AVAILABLE, _REASON = backend.is_available()
pytestmark = pytest.mark.skipif(not _AVAILABLE, reason=_REASON)
FORMATS = [
    *(Format.affine(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES),
    *map(Format.named, FLOAT_FORMATS),
    Format.affine(4, rotated=True),
]
FOUR = Format.affine(4)

scaled_dot_product_attention = make_dispatcher(base.scaled_dot_product_attention)


def attend(cache: Any, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    mask = "causal" if queries.shape[2] > 1 else None
    keys, values = cache.update_and_fetch(keys, values)
    return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=0.125, mask=mask)


def attend_twice(cache: Any, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Two calls over the same rows, which depend on each other in nothing else."""
    mask = "causal" if queries.shape[2] > 1 else None
    keys, values = cache.update_and_fetch(keys, values)
    first = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=0.125, mask=mask)
    second = scaled_dot_product_attention(-queries, keys, values, cache=cache, scale=0.125, mask=mask)
    return first - second


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_format(format: Format, dtype: mx.Dtype) -> None:
    """The check at first use writes twice and compares bytes, those around the rows among them."""
    assert can_write_rows("cuda", Rows(format.fit(128)[0], dtype, 128, 2)) == (True, "")
    rotated = "rows of 72 numbers are rotated in MLX's own operations"
    padded = can_write_rows("cuda", Rows(format.fit(72)[0], dtype, 72, 2))
    assert padded == ((False, rotated) if format.rotated else (True, ""))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", CACHES)
def test_random_walks(kind: str, seed: int) -> None:
    """Many steps are evaluated together, or never but for a later one."""
    walk = Walk(attend, mx.float16, seed, batch=2 if kind == "batch" else 1)
    walk.run(CACHES[kind], 150)
    assert walk.in_place > 10
    for actual, wanted in walk.attended:
        assert mx.abs(actual - wanted).max() <= 1e-3 * mx.abs(wanted).max()


def test_walks_of_layers_that_share_rows() -> None:
    walk = Walk(attend_twice, mx.bfloat16, 0)
    walk.run(CACHES["growing"], 150)
    for actual, wanted in walk.attended:
        assert mx.abs(actual - wanted).max() <= 1e-2 * mx.abs(wanted).max()


@pytest.mark.parametrize(
    ("format", "heads", "kv_heads", "dim", "lengths"),
    [
        (FOUR, 32, 8, 128, (1, 3)),
        (FOUR, 32, 2, 256, (1, 2)),
        (FOUR, 8, 2, 512, (1,)),
        (FOUR, 8, 8, 64, (1, 5)),
        (Format.affine(8), 32, 8, 128, (1, 8, 16)),
        (Format.affine(3, 32), 8, 2, 128, (1,)),
        (Format.affine(2, 128), 8, 2, 128, (1,)),
        (Format.affine(6), 6, 2, 192, (1, 2)),
        (Format.named("mxfp8"), 8, 2, 96, (1,)),
        (Format.named("nvfp4"), 8, 2, 128, (1, 4)),
    ],
    ids=str,
)
def test_new_rows_wherever_tiles_end(
    format: Format, heads: int, kv_heads: int, dim: int, lengths: tuple[int, ...]
) -> None:
    """Of all contexts around the ends of tiles, and of long ones, where many blocks share the keys."""
    counts = [1, 14, 15, 16, 31, 32, 47, 62, 63, 64, 65, 127, 128, 500, 1000, 5000, 70000]
    for length in lengths:
        for batch, count in [(1, count) for count in counts] + [(3, 63), (3, 700)]:
            caches = [QuantizedKVCache(format), QuantizedKVCache(format)]
            caches[1]._most_in_place = 0
            old = [mx.random.normal((batch, kv_heads, count, dim)).astype(mx.float16) for _ in range(2)]
            new = [mx.random.normal((batch, n, length, dim)).astype(mx.float16) for n in (heads, kv_heads, kv_heads)]
            for cache in caches:
                cache.update_and_fetch(*old)
            actual, wanted = (attend(cache, *new) for cache in caches)
            full = count + length > -(-count // 256) * 256
            assert (caches[0]._pending is None) == full
            assert mx.array_equal(actual, wanted)
            for stored, same in zip(caches[0].rows or [], caches[1].rows or [], strict=True):
                end = count + length
                assert mx.array_equal(stored[:, :, :end].view(mx.uint8), same[:, :, :end].view(mx.uint8))


def test_a_chunked_cache_attends_to_its_last_rows() -> None:
    caches = [QuantizedChunkedKVCache(40, FOUR), QuantizedChunkedKVCache(40, FOUR)]
    caches[1]._most_in_place = 0
    for _ in range(400):
        new = [mx.random.normal((1, n * HEADS, 1, DIM)).astype(mx.float16) for n in (2, 1, 1)]
        for cache in caches:
            cache.maybe_trim_front()
        actual, wanted = (attend(cache, *new) for cache in caches)
        assert mx.abs(actual - wanted).max() <= 1e-3 * mx.abs(wanted).max()
    assert caches[0]._pending is not None


def test_steps_that_are_never_attended_to_are_written_all_the_same() -> None:
    cache, twin = QuantizedKVCache(FOUR), QuantizedKVCache(FOUR)
    twin._most_in_place = 0
    for _ in range(200):
        new = [mx.random.normal((1, n * HEADS, 1, DIM)).astype(mx.float16) for n in (2, 1, 1)]
        attend(cache, *new)
        attend(twin, *new)
    assert cache._pending is not None
    for actual, wanted in zip(cache.rows or [], twin.rows or [], strict=True):
        assert mx.array_equal(actual[:, :, :200], wanted[:, :, :200])


def test_what_is_read_in_the_same_evaluation_is_written_before() -> None:
    """Operations of MLX, built on rows that no evaluation has asked for yet, get them."""
    for seed in range(50):
        mx.random.seed(seed)
        cache, twin = QuantizedKVCache(FOUR), QuantizedKVCache(FOUR)
        twin._most_in_place = 0
        for _ in range(3):
            new = [mx.random.normal((1, n * 8 * HEADS, 1, DIM)).astype(mx.float16) for n in (2, 1, 1)]
            attend(cache, *new)
            attend(twin, *new)
        read = [mx.concatenate([x[:, :, :3].view(mx.uint8).flatten() for x in c.rows or []]) for c in (cache, twin)]
        assert mx.array_equal(read[0], read[1])


def test_a_route_that_reads_arrays_waits_and_then_leaves_writing_to_mlx() -> None:
    cache, twin = QuantizedKVCache(FOUR), QuantizedKVCache(FOUR)
    twin._most_in_place = 0
    for _ in range(6):
        new = [mx.random.normal((1, n * HEADS, 1, DIM)).astype(mx.float16) for n in (2, 1, 1)]
        with qsdpa_patch.enabled(kernels="ops"):
            actual, wanted = attend(cache, *new), attend(twin, *new)
        assert mx.abs(actual - wanted).max() <= 1e-3 * mx.abs(wanted).max()
    assert cache._most_in_place == 0
