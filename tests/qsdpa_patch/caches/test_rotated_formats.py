"""Caches of rotated rows: what they read as, how they travel, and what the report says where they cannot be rotated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache

import qsdpa_patch
from qsdpa_patch import caches
from qsdpa_patch.architectures.tiny_models import build
from qsdpa_patch.cache_creation import quantize_cache
from qsdpa_patch.caches import QuantizedCache, QuantizedKVCache, QuantizedLatentCache
from qsdpa_patch.demo.fidelity import quantized_prompt_cache
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, quantize
from qsdpa_patch.layer_tags import LayerTag, set_tag
from tests.qsdpa_patch.caches.twins import Kind, Rows, assert_same, saved_and_loaded

ROTATED = Format.affine(4, rotated=True)
EMPTY: list[QuantizedCache] = [
    caches.QuantizedKVCache(ROTATED),
    caches.QuantizedRotatingKVCache(7, 2, ROTATED),
    caches.QuantizedChunkedKVCache(7, ROTATED),
    caches.BatchQuantizedKVCache([0, 2], ROTATED),
    caches.BatchQuantizedRotatingKVCache(7, [0, 2], ROTATED),
]


@pytest.mark.parametrize("empty", EMPTY, ids=lambda cache: type(cache).__qualname__)
@pytest.mark.parametrize("dim", [64, 80])
def test_rotated_rows_read_as_they_came(empty: Any, dim: int, tmp_path: Path) -> None:
    cache = copy.deepcopy(empty)
    drawn = Rows(Kind(key_dim=dim, value_dim=dim, batch=2 if hasattr(cache, "left_padding") else 1)).draw(5)
    fetched = cache.update_and_fetch(*drawn)
    for x, tensor in zip(drawn, fetched):
        assert isinstance(tensor, QuantizedTensor)
        assert tensor.format.rotated
        assert_same(mx.array(tensor), mx.array(quantize(x, ROTATED)))
    for other in (copy.deepcopy(cache), saved_and_loaded(cache, tmp_path / "cache.safetensors")):
        assert (other.key_format, other.value_format) == (cache.key_format, cache.value_format)
        for actual, expected in zip(other.keys_and_values(), fetched):
            assert_same(mx.array(actual), mx.array(expected))


def test_batches_are_of_rotated_rows_or_of_others() -> None:
    rows = Rows(Kind())
    cache, other, plain = QuantizedKVCache(ROTATED), QuantizedKVCache(ROTATED), QuantizedKVCache(ROTATED.packing)
    for each in (cache, other, plain):
        each.update_and_fetch(*rows.draw(4))
    batch = QuantizedKVCache.merge([cache, other])
    assert batch.key_format == ROTATED
    assert_same(mx.array(batch.extract(1).keys_and_values()[0]), mx.array(other.keys_and_values()[0]))
    with pytest.raises(ValueError, match="no batch of caches"):
        QuantizedKVCache.merge([cache, plain])


def test_a_stock_cache_is_rotated_as_it_is_taken_over() -> None:
    stock = mlx_lm_cache.QuantizedKVCache(group_size=64, bits=4)
    codes, scales, biases = stock.update_and_fetch(*Rows(Kind()).draw(5))[0]
    rows = mx.dequantize(codes, scales, biases, group_size=64, bits=4)
    keys, _ = QuantizedKVCache.from_cache(stock, ROTATED).keys_and_values()
    assert_same(mx.array(keys), mx.array(quantize(rows, ROTATED)))


def test_the_rotary_keys_of_a_latent_stay_as_they_are() -> None:
    cache = QuantizedLatentCache(ROTATED)
    drawn = Rows(Kind(key_dim=256, heads=1)).draw(5)
    latent, rope_keys = cache.update_and_fetch(*drawn)
    assert isinstance(latent, QuantizedTensor)
    assert latent.format.rotated
    assert_same(mx.array(rope_keys), drawn[1])


def test_the_report_says_where_rows_are_not_rotated() -> None:
    with qsdpa_patch.enabled(rotate=True):
        source = mlx_lm_cache.KVCache()
        set_tag(source, LayerTag("llama", "llama", 3, "full"))
        cache = quantize_cache(source, 4, 64)
        cache.update_and_fetch(*Rows(Kind(key_dim=100, value_dim=64)).draw(2))
        notes = [note["note"] for note in qsdpa_patch.report().to_dict()["notes"]]
    assert notes == ["keys not rotated: 100 is no multiple of 8"]
    assert (cache.key_format.rotated, cache.value_format.rotated) == (False, True)


@pytest.mark.parametrize("bits", [2, 4])
def test_attention_over_a_rotated_cache_is_that_over_what_it_reads_as(bits: int) -> None:
    cache = QuantizedKVCache(Format.affine(bits, rotated=True))
    keys, values = cache.update_and_fetch(*Rows(Kind(key_dim=80, value_dim=80)).draw(30))
    assert isinstance(keys, QuantizedTensor)
    assert isinstance(values, QuantizedTensor)
    queries = mx.random.normal((1, 4, 3, 80), key=mx.random.key(1))
    out = qsdpa_patch.quantized_scaled_dot_product_attention(queries, keys, values, scale=0.1, mask="causal")
    plain = [mx.array(x) for x in (keys, values)]
    wanted = mx.fast.scaled_dot_product_attention(queries, *plain, scale=0.1, mask="causal")
    assert mx.allclose(out, wanted, atol=1e-5).item()


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3", "gemma2"])
def test_a_rotated_cache_goes_on_working_when_the_patch_is_off(architecture: str) -> None:
    model = build(architecture)
    tokens = mx.array([[3, 14, 15, 9, 26, 5, 35]])
    with qsdpa_patch.enabled(rotate=True, kernels="ops"):
        cache = quantized_prompt_cache(model, 8)
        model(tokens, cache=cache)
        continued = copy.deepcopy(cache)
        wanted = model(mx.array([[8]]), cache=continued)
    assert all(layer.key_format.rotated for layer in cache)
    assert mx.allclose(model(mx.array([[8]]), cache=cache), wanted, rtol=1e-3, atol=1e-3).item()
