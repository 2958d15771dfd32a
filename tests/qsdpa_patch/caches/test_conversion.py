"""Which quantized cache goes with which of mlx-lm's."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch import caches
from qsdpa_patch.caches import is_quantizable, quantized
from qsdpa_patch.kernels.format import Format

TWINS: list[tuple[Any, type[Any]]] = [
    (mlx_lm_cache.KVCache(), caches.QuantizedKVCache),
    (mlx_lm_cache.QuantizedKVCache(), caches.QuantizedKVCache),
    (mlx_lm_cache.RotatingKVCache(8, 2), caches.QuantizedRotatingKVCache),
    (mlx_lm_cache.ChunkedKVCache(8), caches.QuantizedChunkedKVCache),
    (mlx_lm_cache.BatchKVCache([0, 1]), caches.BatchQuantizedKVCache),
    (mlx_lm_cache.BatchRotatingKVCache(8, [0, 1]), caches.BatchQuantizedRotatingKVCache),
]
LATENT_TWINS: list[tuple[Any, type[Any]]] = [
    (mlx_lm_cache.KVCache(), caches.QuantizedLatentCache),
    (mlx_lm_cache.BatchKVCache([0, 1]), caches.BatchQuantizedLatentCache),
    (mlx_lm_cache.RotatingKVCache(8), caches.QuantizedRotatingKVCache),
]


@pytest.mark.parametrize(("cache", "twin"), TWINS, ids=lambda x: getattr(x, "__name__", type(x).__name__))
def test_each_has_its_twin(cache: Any, twin: type[Any]) -> None:
    assert is_quantizable(cache)
    converted: Any = quantized(cache, Format.affine(4), "mxfp4")
    assert converted.__class__ is twin
    assert (converted.key_format, converted.value_format) == (Format.affine(4), Format.named("mxfp4"))


@pytest.mark.parametrize(("cache", "twin"), LATENT_TWINS, ids=lambda x: getattr(x, "__name__", type(x).__name__))
def test_the_second_half_of_a_latent_cache_stays_plain(cache: Any, twin: type[Any]) -> None:
    converted: Any = quantized(cache, Format.affine(4), latent=True)
    assert converted.__class__ is twin
    assert (converted.key_format, converted.value_format) == (Format.affine(4), None)


@pytest.mark.parametrize("cache", [mlx_lm_cache.ArraysCache(2), caches.QuantizedKVCache(), object()])
def test_others_are_left_as_they_are(cache: Any) -> None:
    assert not is_quantizable(cache)
    assert quantized(cache) is cache


def test_a_class_of_someone_elses_is_left_as_it_is() -> None:
    class OtherCache(mlx_lm_cache.KVCache):  # type: ignore[misc] # mlx-lm has no annotations
        """Might do anything."""

    assert not is_quantizable(OtherCache())


def test_members_of_a_list_are_converted() -> None:
    state = mlx_lm_cache.ArraysCache(2)
    listed = mlx_lm_cache.CacheList(state, mlx_lm_cache.KVCache())
    assert is_quantizable(listed)
    converted = quantized(listed, Format.affine(4))
    assert type(converted) is mlx_lm_cache.CacheList
    assert converted[0] is state
    assert type(converted[1]) is caches.QuantizedKVCache


def test_members_of_a_list_can_be_left_out() -> None:
    listed = mlx_lm_cache.CacheList(mlx_lm_cache.KVCache(), mlx_lm_cache.KVCache())
    converted = quantized(listed, Format.affine(4), latent=True, members=(0,))
    assert type(converted[0]) is caches.QuantizedLatentCache
    assert converted[1] is listed[1]


def test_stock_dispatch_takes_what_a_quantized_cache_gives() -> None:
    """A cache goes on working when nothing is patched: what it gives are arrays, and nothing says it is quantized."""
    from mlx_lm.models.base import scaled_dot_product_attention

    cache = caches.QuantizedKVCache(Format.affine(8))
    keys, values = cache.update_and_fetch(mx.random.normal((1, 2, 5, 64)), mx.random.normal((1, 2, 5, 64)))
    queries = mx.random.normal((1, 4, 1, 64))
    out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=0.125, mask=None)
    expected = mx.fast.scaled_dot_product_attention(queries, mx.array(keys), mx.array(values), scale=0.125)
    assert mx.allclose(out, expected)


def test_importing_the_caches_patches_nothing() -> None:
    code = (
        "import mlx_lm.models.cache as c; before = dict(vars(c)); import qsdpa_patch.caches;"
        "assert {k: v for k, v in vars(c).items() if k in before} == before and len(vars(c)) == len(before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
