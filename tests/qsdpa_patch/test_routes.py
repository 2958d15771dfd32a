"""Which route a call takes, what is counted, and what happens when a kernel fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

import qsdpa_patch
from qsdpa_patch import FallbackError, Format, quantize, quantized_scaled_dot_product_attention, routes
from qsdpa_patch.kernels import reference
from qsdpa_patch.kernels.attention_call import AttentionCall, Signature, check_call
from qsdpa_patch.kernels.backends import Declined

Install = Callable[..., SimpleNamespace]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a backend of our making in the place of every backend."""

    def put(attend: Callable[[AttentionCall], mx.array] = reference.attend, **answers: Any) -> SimpleNamespace:
        asked: list[Signature] = []

        def has_fused_kernel(signature: Signature) -> tuple[bool, str]:
            asked.append(signature)
            answer: tuple[bool, str] = answers.get("fused", (True, ""))
            return answer

        backend = SimpleNamespace(
            is_available=lambda: answers.get("available", (True, "")),
            has_fused_kernel=has_fused_kernel,
            attend=attend,
            asked=asked,
        )
        monkeypatch.setattr(routes, "load_backend", lambda name: backend)
        monkeypatch.setattr(qsdpa_patch.dispatcher.router, "_decisions", {})
        return backend

    return put


def call(length: int = 1, dim: int = 64) -> mx.array:
    k = quantize(mx.random.normal((1, 2, 100, dim)), Format.affine(4))
    q = mx.random.normal((1, 4, length, dim))
    out = quantized_scaled_dot_product_attention(q, k, k, scale=0.1, mask="causal")
    wanted = mx.fast.scaled_dot_product_attention(q, mx.array(k), mx.array(k), scale=0.1, mask="causal")
    assert mx.allclose(out, wanted, atol=1e-5)
    return out


def rows() -> list[tuple[str, str]]:
    return [(row.route, row.reason) for row in qsdpa_patch.report().rows]


def test_fused(install: Install) -> None:
    backend = install()
    for _ in range(5):
        call()
    assert rows() == [("fused", "")]
    assert qsdpa_patch.report().calls["fused"] == 5
    assert len(backend.asked) == 1, "a decision is remembered"


def test_a_padded_head_dim_is_cut_back(install: Install) -> None:
    backend = install()
    assert call(dim=80).shape[-1] == 80
    assert backend.asked[0].key_dim == 96


def test_reasons(install: Install) -> None:
    install(fused=(False, "head_dim 64 is not my thing"))
    call()
    call(length=20)
    assert sorted(rows()) == [("ops", "head_dim 64 is not my thing"), ("prefill", "head_dim 64 is not my thing")]


def test_unavailable(install: Install) -> None:
    backend = install(available=(False, "there is no compiler"))
    call()
    assert rows() == [("ops", "there is no compiler")]
    assert backend.asked == []


def test_ops_asks_no_backend(install: Install) -> None:
    backend = install()
    with qsdpa_patch.enabled(kernels="ops"):
        call()
        assert rows() == [("ops", "kernels='ops' turns fused kernels off")]
    assert backend.asked == []


def test_declined_calls_are_asked_again(install: Install) -> None:
    def attend(call: AttentionCall) -> mx.array:
        raise Declined("inputs are traced")

    install(attend)
    call()
    call()
    assert rows() == [("ops", "inputs are traced")]
    assert qsdpa_patch.report().rows[0].calls == 2


def test_a_failing_kernel_is_reported_once_and_not_tried_again(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def attend(call: AttentionCall) -> mx.array:
        tries.append(call)
        raise RuntimeError("error: expected ';' before '}'")

    install(attend)
    with caplog.at_level(logging.WARNING, "qsdpa_patch"):
        for _ in range(3):
            call()
    assert len(tries) == 1
    assert len(caplog.records) == 1
    assert "kernel failed: error: expected ';'" in caplog.text
    ((route, reason),) = rows()
    assert route == "ops"
    assert "kernel failed" in reason


def test_a_broken_backend_does_not_stop_generation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(name: str) -> Any:
        raise ImportError("no such thing")

    monkeypatch.setattr(routes, "load_backend", load)
    monkeypatch.setattr(qsdpa_patch.dispatcher.router, "_decisions", {})
    call()
    assert "cannot be used: no such thing" in rows()[0][1]
    assert "cannot be used" in caplog.text


def test_strict(install: Install) -> None:
    install(fused=(False, "not on this device"))
    with qsdpa_patch.enabled(strict=True):
        with pytest.raises(FallbackError, match=r"not on this device \(q \[1, 4, 1, 64\] k \[1, 2, 100, 64\] 4-bit"):
            call()
        call(length=40)  # a long prompt takes the route made for it


def transient_of(heads: int, kv_heads: int, length: int, count: int, mask: str) -> float:
    """Peak megabytes above inputs and output of a 4-bit call with D 128."""
    packed = [
        quantize(mx.random.normal((1, kv_heads, count, 128), key=mx.random.key(i)), Format.affine(4)) for i in range(2)
    ]
    queries = mx.random.normal((1, heads, length, 128))
    array_mask = mx.random.bernoulli(0.9, (length, count))
    mx.eval(queries, array_mask, *packed[0].parts, *packed[1].parts)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out = quantized_scaled_dot_product_attention(
        queries, packed[0], packed[1], scale=128**-0.5, mask=array_mask if mask == "bool" else mask
    )
    mx.eval(out)
    return (mx.get_peak_memory() - before - out.nbytes) / 1e6


@pytest.mark.parametrize("mask", ["causal", "bool"])
def test_prefill_in_ops_stays_within_its_budget(mask: str) -> None:
    """Per KV head the shape below (stock: 0.6 GB a head), with fewer heads and rows, since MLX's CPU matmul is slow."""
    with qsdpa_patch.enabled(kernels="ops"):
        assert transient_of(8, 2, 256, 32768, mask) < 300
    assert qsdpa_patch.report().calls["prefill"] == 1


def test_a_long_prompt_stays_within_its_budget() -> None:
    """Hq 32, Hkv 8, D 128, L 2048, N 32768, 4 bits: stock's scores alone take over 4 GB."""
    router = qsdpa_patch.dispatcher.router
    probe = quantize(mx.zeros((1, 1, 32, 128)), Format.affine(4))
    signature = check_call(mx.zeros((1, 1, 32, 128)), probe, probe, scale=1.0, mask="causal").signature
    fused, reason = router.has_fused_kernel(signature)
    if not fused and mx.default_device().type == mx.DeviceType.cpu:
        pytest.skip(f"takes minutes in ops on a CPU, and no fused kernel is here: {reason}")
    assert transient_of(32, 8, 2048, 32768, "causal") < 300
