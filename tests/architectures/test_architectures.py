"""Every architecture of the installed mlx-lm, as a tiny random model: with the patch on, quantized caches just work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qsdpa_patch
from qsdpa_patch.architectures.sizes import NEEDS_METAL, NOT_BUILT, SIZES
from qsdpa_patch.architectures.tiny_models import build
from qsdpa_patch.caches import QuantizedCache
from qsdpa_patch.dispatcher import router
from qsdpa_patch.kernels import reference
from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.layer_tags import tag_of
from qsdpa_patch.routes import Caller
from tests.architectures.runs import CHUNKS, DECODED, deviations, leaves, prompt_and_reply, run

BUILT = [name for name in SIZES if mx.metal.is_available() or name not in NEEDS_METAL]

LEAST_EFFECT = 0.03
"""By how much logits must change, at least, with another prompt: else attention would not matter, nor this test."""

QUANTIZATION_ERROR = {8: 0.03, 4: 0.4}
"""By bits: the median over positions of the deviation from the unquantized model, as a share of that effect.

Measured over all architectures: 0.005 to 0.025 at 8 bits and 0.08 to 0.33 at 4 (random weights, groups of 64)."""

CALL_ERROR = 1e-4
"""Of one attention call against the reference over the same quantized values, over the largest output."""

MODEL_ERROR = {0.5: 2e-3, 0.9: 2e-2}
"""By quantile over positions: the deviation from mlx-lm's own attention over its own caches, with rows rounded alike.

It is about 1e-6, unless a last bit makes a number round to the neighbouring code: that row stays different."""


@dataclass(frozen=True)
class Subject:
    """A model, what it says unquantized with the patch off, and how much that depends on the prompt.

    effect: the median deviation of the logits of the reply when it follows another prompt.
    """

    model: Any
    tokens: mx.array
    logits: mx.array
    effect: float


@pytest.fixture(scope="module", params=BUILT)
def subject(request: pytest.FixtureRequest) -> Subject:
    assert not qsdpa_patch.is_enabled()
    model, tokens = build(request.param), prompt_and_reply()
    logits = run(model, tokens).logits
    start = sum(CHUNKS)
    other = run(model, mx.concatenate([prompt_and_reply(1)[:, :start], tokens[:, start:]], axis=1)).logits
    return Subject(model, tokens, logits, median(deviations(other, logits)[-DECODED:]))


def median(x: mx.array) -> float:
    return quantile(x, 0.5)


def quantile(x: mx.array, share: float) -> float:
    return float(mx.sort(x)[int(x.size * share)])


@pytest.fixture
def call_errors(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The error of every call that the router serves, against the reference."""
    errors: list[float] = []
    attend = router.attend

    def checked(call: AttentionCall, caller: Caller) -> mx.array:
        out = attend(call, caller)
        expected = reference.attend(call)[..., : call.output_dim]
        errors.append(float(mx.abs(out - expected).max() / mx.abs(expected).max()))
        return out

    monkeypatch.setattr(router, "attend", checked)
    return errors


def test_every_module_of_mlx_lm_is_covered() -> None:
    spec = find_spec("mlx_lm.models")
    assert spec is not None
    assert spec.submodule_search_locations
    sources = Path(spec.submodule_search_locations[0]).glob("*.py")
    has_model = re.compile(r"^(class Model\b|from .* import .*\bModel\b)", re.MULTILINE)
    models = {path.stem for path in sources if has_model.search(path.read_text())}
    assert models == {*SIZES, *NOT_BUILT}


def test_unquantized_caches_are_served_by_stock(subject: Subject) -> None:
    with qsdpa_patch.enabled():
        logits = run(subject.model, subject.tokens).logits
    assert mx.array_equal(logits, subject.logits)
    assert subject.effect >= LEAST_EFFECT


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_caches(subject: Subject, bits: int, call_errors: list[float]) -> None:
    with qsdpa_patch.enabled():
        quantized = run(subject.model, subject.tokens, bits=bits)
    assert mx.isfinite(quantized.logits).all()
    assert max(call_errors, default=0.0) <= CALL_ERROR
    error = median(deviations(quantized.logits, subject.logits))
    assert error <= QUANTIZATION_ERROR[bits] * subject.effect
    rounded = deviations(quantized.logits, run(subject.model, subject.tokens, twins=quantized.caches).logits)
    for share, bound in MODEL_ERROR.items():
        assert quantile(rounded, share) <= bound
    assert_explained(quantized.caches, qsdpa_patch.report())


def assert_explained(caches: list[Any], report: qsdpa_patch.Report) -> None:
    """Every layer whose calls are not all fused, or whose cache is not quantized, has its reason in the report."""
    told = {(model_type, kind) for model_type, kind, _ in report.notes}
    for row in report.rows:
        assert row.route == "fused" or row.reason
        told.add((row.model_type, row.layer_kind))
    kept = {(model_type, kind) for model_type, kind, note in report.notes if note.startswith("kept unquantized: ")}
    for cache in leaves(caches):
        tag = tag_of(cache)
        assert tag is not None
        assert (tag.model_type, tag.kind) in (told if isinstance(cache, QuantizedCache) else kept)
