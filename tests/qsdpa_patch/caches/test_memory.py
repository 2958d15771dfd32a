"""Appending must not copy the cache, and conversion must not hold two copies of it for long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from qsdpa_patch.caches import (
    QuantizedChunkedKVCache,
    QuantizedKVCache,
    QuantizedLatentCache,
    QuantizedRotatingKVCache,
    quantized,
)
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor

async_eval: Any = mx.async_eval  # without annotations in MLX

HEADS, COUNT, DIM = 2, 4096, 128
LAYERS = 8
OPS_PER_LAYER = 40  # a real layer has about as many

MAKERS: dict[str, Any] = {
    "growing": lambda: QuantizedKVCache(Format.affine(8)),
    "latent": lambda: QuantizedLatentCache(Format.affine(8)),
    "rotating": lambda: QuantizedRotatingKVCache(COUNT + 64, 4),
    "chunked": lambda: QuantizedChunkedKVCache(COUNT),
}


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu() -> Iterator[None]:
    """How far the host may run ahead, and with that what it may write in place, is known there."""
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    yield
    mx.set_default_device(device)


def filled(cache: Any) -> Any:
    shape = (1, HEADS, COUNT, DIM)
    cache.update_and_fetch(mx.zeros(shape), mx.ones(shape))
    mx.eval(cache.state)
    return cache


def step(caches: list[Any], x: mx.array) -> mx.array:
    """A token: each layer appends to its cache and reads it, as attention would, from the packed parts."""
    for cache in caches:
        if hasattr(cache, "maybe_trim_front"):
            cache.maybe_trim_front()
        for fetched in cache.update_and_fetch(x, x):
            for part in fetched.parts if isinstance(fetched, QuantizedTensor) else [getattr(fetched, "plain", fetched)]:
                x = x + part[..., :1, :1].astype(x.dtype)
        for _ in range(OPS_PER_LAYER):
            x = mx.tanh(x)
    return x


@pytest.mark.parametrize("ahead", [False, True], ids=["eval", "async_eval one ahead"])
@pytest.mark.parametrize("kind", MAKERS)
def test_appending_is_in_place(kind: str, ahead: bool) -> None:
    caches = [filled(MAKERS[kind]()) for _ in range(LAYERS)]
    x = mx.zeros((1, HEADS, 1, DIM))
    for _ in range(3):  # the first one makes the buffers grow
        x = step(caches, x)
        mx.eval(x)
    one_buffer = min(part.nbytes for part in caches[0].keys)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    if ahead:
        async_eval(x)
    for _ in range(10):
        following = step(caches, x)
        if ahead:
            async_eval(following)
            mx.eval(x)
        else:
            mx.eval(following)
        x = following
    mx.eval(x)
    assert mx.get_peak_memory() - before < one_buffer


def test_growing_holds_no_more_than_one_part_twice() -> None:
    caches = [filled(QuantizedKVCache(Format.affine(8))) for _ in range(LAYERS)]
    packed = sum(cache.nbytes for cache in caches)
    x = mx.zeros((1, HEADS, 1, DIM))
    mx.eval(x)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(caches, x))
    assert sum(cache.nbytes for cache in caches) <= packed * 9 / 8
    assert mx.get_peak_memory() - before < packed / 8 + 2 * packed / LAYERS


def test_conversion_frees_what_it_converted() -> None:
    caches: list[Any] = [filled(KVCache()) for _ in range(LAYERS)]
    plain = sum(cache.nbytes for cache in caches)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for i in range(LAYERS):
        caches[i] = quantized(caches[i], Format.affine(8))
    mx.eval([cache.state for cache in caches])
    packed = sum(cache.nbytes for cache in caches)
    assert mx.get_peak_memory() - before < 1.1 * packed
    assert mx.get_active_memory() - before < 1.1 * packed - plain
