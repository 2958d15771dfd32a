"""Every architecture in bfloat16, as models are run: caches and kernels meet the dtypes that a model mixes."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qsdpa_patch
from qsdpa_patch.architectures.sizes import NEEDS_METAL
from qsdpa_patch.architectures.tiny_models import build
from tests.architectures.measures import deviations, median
from tests.architectures.runs import CHUNKS, prompt_and_reply, run
from tests.architectures.subjects import BUILT

QUANTIZATION_ERROR = 0.1
"""The median deviation from the unquantized model: 0.004 to 0.05, measured, bfloat16's own rounding included."""


@pytest.fixture
def gather_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with the weights of experts, which MLX's CPU build has in float32 alone."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return
    in_float32 = mx.gather_mm

    def gather_mm(a: mx.array, b: mx.array, **options: object) -> mx.array:
        return in_float32(a.astype(mx.float32), b.astype(mx.float32), **options).astype(a.dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(mx, "gather_mm", gather_mm)


@pytest.mark.parametrize("architecture", [*BUILT, *(NEEDS_METAL if mx.metal.is_available() else ())])
def test_bfloat16(architecture: str, gather_mm: None) -> None:
    model = build(architecture, dtype=mx.bfloat16)
    tokens = prompt_and_reply()[:, : sum(CHUNKS) + 2]
    expected = run(model, tokens).logits
    with qsdpa_patch.enabled():
        quantized = run(model, tokens, bits=8).logits
    assert mx.isfinite(quantized).all()
    assert median(deviations(quantized, expected)) <= QUANTIZATION_ERROR
