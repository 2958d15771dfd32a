"""What the dispatcher sends where, and that results are right, whatever keys and values it is handed."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache
from mlx_lm.models.cache import QuantizedKVCache as StockQuantizedKVCache

import qsdpa_patch
from qsdpa_patch import Format, QuantizedTensor, quantize
from qsdpa_patch.dispatcher import router
from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.latent_rope import RopeKeys, RopeScores
from qsdpa_patch.layer_tags import LayerTag, set_tag
from qsdpa_patch.routes import Caller

SCALE = 64**-0.5


@pytest.fixture
def attend() -> Any:
    """The patched dispatcher, as a model calls it."""
    qsdpa_patch.enable()
    return lambda *args, **kwargs: base.scaled_dot_product_attention(*args, **kwargs)


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def sdpa(q: mx.array, k: mx.array, v: mx.array, **kwargs: Any) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, mx.array(k), mx.array(v), scale=SCALE, **kwargs)


def test_plain_calls_are_bit_identical_and_counted(attend: Any) -> None:
    q, k, v = random(1, 4, 3, 64), random(1, 2, 9, 64, seed=1), random(1, 2, 9, 64, seed=2)
    out = attend(q, k, v, cache=None, scale=SCALE, mask="causal")
    assert mx.array_equal(out, sdpa(q, k, v, mask="causal"))
    assert qsdpa_patch.report().calls["stock"] == 1


def test_plain_arrays_of_a_foreign_cache_with_bits_stay_plain(attend: Any) -> None:
    q, k = random(1, 4, 1, 64), random(1, 2, 9, 64)
    out = attend(q, k, k, cache=SimpleNamespace(bits=4, group_size=64), scale=SCALE, mask=None)
    assert mx.array_equal(out, sdpa(q, k, k))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("with_cache", [True, False])
def test_stocks_tuples(attend: Any, bits: int, group_size: int, with_cache: bool) -> None:
    cache = StockQuantizedKVCache(group_size=group_size, bits=bits)
    keys, values = cache.update_and_fetch(random(1, 2, 300, 64), random(1, 2, 300, 64, seed=1))
    plain = [mx.dequantize(x[0], x[1], x[2], group_size, bits) for x in (keys, values)]
    q = random(1, 6, 2, 64, seed=2)
    before = mx.array(q)
    out = attend(q, keys, values, cache=cache if with_cache else None, scale=SCALE, mask="causal")
    assert mx.allclose(out, sdpa(q, *plain, mask="causal"), atol=1e-5)
    assert mx.array_equal(q, before), "the caller's queries were changed"


def test_sinks(attend: Any) -> None:
    k = quantize(random(1, 2, 20, 64), Format.affine(8))
    q, sinks = random(1, 4, 1, 64), random(4, seed=3)
    assert mx.allclose(
        attend(q, k, k, cache=None, scale=SCALE, mask=None, sinks=sinks), sdpa(q, k, k, sinks=sinks), atol=1e-5
    )


def test_one_quantized_side(attend: Any) -> None:
    plain, packed = random(1, 2, 20, 64), quantize(random(1, 2, 20, 64, seed=1), Format.affine(8))
    q = random(1, 4, 1, 64, seed=2)
    for k, v in ((plain, packed), (packed, plain)):
        assert mx.allclose(attend(q, k, v, cache=None, scale=SCALE, mask=None), sdpa(q, k, v), atol=1e-5)


def test_a_quantized_tensor_serves_stock_after_disable() -> None:
    k, q = quantize(random(1, 2, 20, 64), Format.affine(8)), random(1, 4, 1, 64)
    assert not qsdpa_patch.is_enabled()
    out = base.scaled_dot_product_attention(q, k, k, cache=KVCache(), scale=SCALE, mask=None)
    assert mx.array_equal(out, sdpa(q, k, k))


def test_the_rope_term_is_taken_from_the_lazy_scores(attend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As absorbed MLA calls it: the product is passed as a mask, and the kernels get its factors."""
    latent = quantize(random(2, 1, 30, 256), Format.affine(8))
    rope, q = random(2, 1, 30, 64, seed=1), random(2, 8, 1, 256, seed=2)
    q_rope = random(2, 8, 1, 64, seed=3)
    scores = (q_rope * SCALE) @ RopeKeys(rope).swapaxes(-1, -2)
    assert type(scores) is RopeScores
    wanted = sdpa(q, latent, latent, mask=(q_rope * SCALE) @ rope.swapaxes(-1, -2))
    seen = []
    real = router.attend

    def attend_and_see(call: AttentionCall, caller: Caller) -> mx.array:
        seen.append(call)
        return real(call, caller)

    monkeypatch.setattr(router, "attend", attend_and_see)
    out = attend(q, latent, latent, cache=None, scale=SCALE, mask=scores)
    assert mx.allclose(out, wanted, atol=1e-5)
    assert seen[0].rope is not None
    assert seen[0].mask is None
    assert seen[0].signature.shared_kv
    masked = mx.where(mx.arange(30) > 4, scores, -1e9)
    assert type(masked) is mx.array
    assert mx.allclose(
        attend(q, latent, latent, cache=None, scale=SCALE, mask=masked), sdpa(q, latent, latent, mask=masked), atol=1e-5
    )


def test_only_the_chosen_models_are_covered() -> None:
    importlib.import_module("mlx_lm.models.llama")
    cache = StockQuantizedKVCache(group_size=64, bits=8)
    keys, values = cache.update_and_fetch(random(1, 2, 64, 64), random(1, 2, 64, 64, seed=1))
    q = random(1, 4, 1, 64)
    qsdpa_patch.enable(models=["llama"])
    for model, calls in (("qwen3", 0), ("llama", 1)):
        set_tag(cache, LayerTag(model, model, 0, "full"))
        base.scaled_dot_product_attention(q + 0, keys, values, cache=cache, scale=SCALE, mask=None)
        assert sum(qsdpa_patch.report().calls.values()) == calls


def test_bad_shapes_are_named(attend: Any) -> None:
    k = quantize(random(1, 2, 20, 64), Format.affine(8))
    with pytest.raises(ValueError, match=r"keys have shape \(1, 2, 20, 64\): queries \(1, 4, 1, 128\) take"):
        attend(random(1, 4, 1, 128), k, k, cache=None, scale=1.0, mask=None)
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key heads"):
        attend(random(1, 3, 1, 64), k, k, cache=None, scale=1.0, mask=None)
    with pytest.raises(ValueError, match=r"mask has shape \(7,\): it must broadcast to \(1, 4, 1, 20\)"):
        attend(random(1, 4, 1, 64), k, k, cache=None, scale=1.0, mask=mx.ones((7,)))
    assert isinstance(k, QuantizedTensor)
