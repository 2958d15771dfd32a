"""What ``qsdpa verify`` measures, on tiny models."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import qsdpa_patch
from qsdpa_patch.architectures.tiny_models import build
from qsdpa_patch.demo.fidelity import Fidelity, compare_distributions, perplexity, quantized_prompt_cache
from qsdpa_patch.verify.measurement import FUSED, OPS, STOCK, UNQUANTIZED, Options, Result, verify
from tests.qsdpa_patch.demo.tiny_model import HEAD_DIM, KV_HEADS, LAYERS, write_tiny_model

TOKENS = [(7 * i * i + 3 * i + 1) % 250 for i in range(45)]
FLOAT32_ROWS = 256 * 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
"""Bytes of an unquantized cache: positions, K and V, layers, heads, dims."""


@pytest.fixture(name="model", scope="module")
def fixture_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return mlx_lm.load(str(write_tiny_model(tmp_path_factory.mktemp("model"))))[0]


def results(model: Any, options: Options, **others: Any) -> dict[str, Result]:
    found, _ = verify(model, others.pop("tokens", TOKENS), options, **others)
    assert not qsdpa_patch.is_enabled()
    return {result.name: result for result in found}


def fidelity(result: Result) -> Fidelity:
    assert result.fidelity is not None, result.error
    return result.fidelity


def test_every_cache_is_measured_as_it_would_be_alone(model: Any) -> None:
    found = results(model, Options(bits=3), chunk=4)
    assert list(found) == [UNQUANTIZED, STOCK, FUSED, OPS]
    plain = mlx_lm.models.cache.make_prompt_cache(model)
    stock = quantized_prompt_cache(model, 3)
    with qsdpa_patch.enabled(kernels="ops"):
        ours = quantized_prompt_cache(model, 3)
        wanted = compare_distributions(model, TOKENS, {"plain": plain, "ours": ours}, reference="plain", chunk=4)
    assert found[UNQUANTIZED].fidelity == wanted["plain"]
    assert found[OPS].fidelity == wanted["ours"]
    assert fidelity(found[FUSED]).mean_kl == pytest.approx(wanted["ours"].mean_kl, rel=0.05)
    assert fidelity(found[STOCK]).perplexity == pytest.approx(perplexity(model, TOKENS, stock, chunk=4), rel=1e-5)
    assert wanted["ours"].mean_kl > 1e-3


def test_memory(model: Any) -> None:
    found = results(model, Options(bits=4, key_bits=8, rotate=True))
    assert found[UNQUANTIZED].cache_bytes == FLOAT32_ROWS
    assert found[STOCK].cache_bytes == FLOAT32_ROWS * 5 / 32  # 4 bits, and 64 for the scale and bias of 64 numbers
    assert found[FUSED].cache_bytes == found[OPS].cache_bytes == FLOAT32_ROWS * 7 / 32
    assert all(result.step_bytes > 0 for result in found.values())


def test_options_reach_the_caches(model: Any) -> None:
    plain, finer, rotated = (
        results(model, options)
        for options in (Options(bits=2), Options(bits=2, key_bits=8, value_bits=8), Options(bits=2, rotate=True))
    )
    assert fidelity(finer[FUSED]).mean_kl < 0.1 * fidelity(plain[FUSED]).mean_kl
    assert finer[STOCK].fidelity == plain[STOCK].fidelity == rotated[STOCK].fidelity
    assert rotated[FUSED].fidelity != plain[FUSED].fidelity
    assert rotated[FUSED].cache_bytes == plain[FUSED].cache_bytes


def test_plain_ops_are_measured_once(model: Any) -> None:
    assert list(results(model, Options(kernels="ops"))) == [UNQUANTIZED, STOCK, FUSED]


def test_a_model_that_stock_cannot_run_is_measured_over_the_others() -> None:
    found = results(build("gpt_oss"), Options(bits=8), tokens=[token % 64 for token in TOKENS])
    assert found[STOCK].fidelity is None
    assert found[STOCK].error == "NotImplementedError: RotatingKVCache Quantization NYI"
    assert found[FUSED].fidelity is not None
    assert found[FUSED].error == ""


def test_the_report_is_that_of_this_run(model: Any) -> None:
    qsdpa_patch.quantized_scaled_dot_product_attention(
        mx.zeros((1, 1, 1, 64)), *[qsdpa_patch.quantize(mx.zeros((1, 1, 3, 64)), "mxfp4")] * 2, scale=1.0
    )
    _, report = verify(model, TOKENS, Options(), chunk=9)
    assert {row.model_type for row in report.rows} == {"llama"}
    assert sum(report.calls.values()) == 2 * LAYERS * 5


def test_what_cannot_be_measured_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        verify(model, [1], Options())
    with pytest.raises(ValueError, match="key_bits=7 is not supported"):
        verify(model, TOKENS, Options(key_bits=7))
    with qsdpa_patch.enabled(), pytest.raises(ValueError, match="the patch is on"):
        verify(model, TOKENS, Options())


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3", "gemma2", "gemma3n", "gpt_oss", "llama4", "phi"])
def test_rotated_caches_of_other_architectures(architecture: str) -> None:
    """Latents, sliding windows, soft caps, shared rows, sinks, chunks, and rows of 80 numbers."""
    model = build(architecture)
    tokens = [token % 64 for token in TOKENS]
    plain, rotated = (results(model, Options(bits=8, rotate=rotate), tokens=tokens) for rotate in (False, True))
    for name in (FUSED, OPS):
        assert fidelity(rotated[name]).mean_kl < 3 * fidelity(plain[name]).mean_kl + 1e-4
        assert rotated[name].cache_bytes == plain[name].cache_bytes
