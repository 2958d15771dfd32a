"""Distributions against distributions, on a tiny model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

import qsdpa_patch
from qsdpa_patch.demo.fidelity import compare_distributions, perplexity, quantized_prompt_cache
from tests.qsdpa_patch.demo.tiny_model import write_tiny_model

TOKENS = [1, 40, 41, 90, 7, 7, 120, 33, 200, 5, 61, 62, 63, 99, 100, 101, 17, 18, 2, 250, 13]


@pytest.fixture(name="model", scope="module")
def fixture_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return mlx_lm.load(str(write_tiny_model(tmp_path_factory.mktemp("model"))))[0]


def log_probabilities(model: Any, cache: list[Any]) -> np.ndarray[Any, Any]:
    """All positions at once, in float64."""
    logits = np.array(model(mx.array(TOKENS)[None], cache=cache)[0].astype(mx.float32), np.float64)
    peak = logits.max(-1, keepdims=True)
    found: np.ndarray[Any, Any] = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    return found


def test_perplexity(model: Any) -> None:
    wanted = log_probabilities(model, make_prompt_cache(model))
    mean = -wanted[np.arange(len(TOKENS) - 1), TOKENS[1:]].mean()
    for chunk in (1, 4, 5, 20, 64):
        found = perplexity(model, TOKENS, make_prompt_cache(model), chunk=chunk)
        assert found == pytest.approx(np.exp(mean), rel=1e-4)


def test_a_cache_against_itself(model: Any) -> None:
    caches = {"a": make_prompt_cache(model), "b": make_prompt_cache(model)}
    results = compare_distributions(model, TOKENS, caches, reference="a", chunk=4)
    assert results["a"] == results["b"]
    assert results["b"].positions == len(TOKENS)
    assert (results["b"].greedy_agreement, results["b"].mean_kl, results["b"].max_kl) == (1, 0, 0)


def test_divergence_over_a_quantized_cache(model: Any) -> None:
    with qsdpa_patch.enabled(kernels="ops"):
        caches = {"plain": make_prompt_cache(model), "2-bit": quantized_prompt_cache(model, 2)}
        found = compare_distributions(model, TOKENS, caches, reference="plain", chunk=4)["2-bit"]
        quantized = log_probabilities(model, quantized_prompt_cache(model, 2))
    wanted = log_probabilities(model, make_prompt_cache(model))
    divergences = (np.exp(wanted) * (wanted - quantized)).sum(-1)
    assert found.mean_kl == pytest.approx(divergences.mean(), rel=1e-3)
    assert found.max_kl == pytest.approx(divergences.max(), rel=1e-3)
    assert found.greedy_agreement == (wanted.argmax(-1) == quantized.argmax(-1)).mean()
    assert found.mean_kl > 1e-3  # 2 bits do show


def test_quantized_from_the_first_token(model: Any) -> None:
    """With the patch off, mlx-lm's own quantized cache; with it on, ours."""
    cache = quantized_prompt_cache(model, 8)
    assert not any(isinstance(c, KVCache) for c in cache)
    assert type(cache[0]).__module__ == "mlx_lm.models.cache"
    with qsdpa_patch.enabled():
        assert type(quantized_prompt_cache(model, 8)[0]).__module__.startswith("qsdpa_patch.")
