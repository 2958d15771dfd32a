"""mlx-lm generating over a quantized cache, with its attention on the Metal kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load

import qsdpa_patch
from qsdpa_patch import Format, caches
from qsdpa_patch.dispatcher import router
from tests.metal.emulated_backend import EmulatedBackend
from tests.qsdpa_patch.demo.tiny_model import write_tiny_model

PROMPT = [40 + (7 * i) % 90 for i in range(21)]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return load(str(write_tiny_model(tmp_path)))[0]


@pytest.fixture(autouse=True)
def forget_decisions() -> Iterator[None]:
    yield
    router._decisions.clear()


def logits_of_steps(model: Any, kernels: str, bits: int) -> list[mx.array]:
    """Logits of the prompt's last token and of four more, fed to caches that are quantized from the start."""
    with qsdpa_patch.enabled(kernels=kernels, strict=kernels == "metal"):
        cache = [caches.QuantizedKVCache(Format.affine(bits, 32)) for _ in model.layers]
        logits = [model(mx.array([PROMPT]), cache)[:, -1]]
        for token in (50, 61, 72, 83):
            logits.append(model(mx.array([[token]]), cache)[:, -1])
        mx.eval(logits)
    return logits


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_decodes_on_the_metal_kernels(metal: EmulatedBackend, model: Any, bits: int) -> None:
    wanted = logits_of_steps(model, "ops", bits)
    qsdpa_patch.reset_report()
    actual = logits_of_steps(model, "metal", bits)
    for one, other in zip(actual, wanted):
        assert mx.abs(one - other).max() <= 5e-3 * mx.abs(other).max()
    calls = qsdpa_patch.report().to_dict()["calls"]
    assert calls["fused"] >= 4 * len(model.layers)  # the prompt may go to MLX's own kernel
    assert calls["ops"] == calls["stock"] == 0
