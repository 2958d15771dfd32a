"""Every architecture of the installed mlx-lm, as a tiny random model: with the patch on, quantized caches just work."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qsdpa_patch
from qsdpa_patch.architectures.sizes import NOT_BUILT, SIZES
from qsdpa_patch.architectures.table import leaves
from qsdpa_patch.caches import QuantizedCache
from qsdpa_patch.dispatcher import router
from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.layer_tags import tag_of
from qsdpa_patch.routes import Caller, Router
from qsdpa_patch.settings import Settings
from tests.architectures.measures import deviations, median, quantile
from tests.architectures.runs import run
from tests.architectures.subjects import MODEL_ERROR, Subject

LEAST_EFFECT = 0.03
"""By how much logits must change, at least, with another prompt: else attention would not matter, nor this test."""

QUANTIZATION_ERROR = {8: 0.03, 4: 0.4}
"""By bits: the median over positions of the deviation from the unquantized model, as a share of that effect.

Measured over all architectures: 0.005 to 0.025 at 8 bits and 0.08 to 0.33 at 4 (random weights, groups of 64)."""

CALL_ERROR = 1e-4
"""Of one attention call against plain ops over the same quantized values, over the largest output."""


@pytest.fixture
def call_errors(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The error of every call that the router serves, against plain ops over the same quantized values."""
    errors: list[float] = []
    attend, in_ops = router.attend, Router(Settings(kernels="ops"))

    def checked(call: AttentionCall, caller: Caller) -> mx.array:
        out, expected = attend(call, caller), in_ops.attend(call, Caller("in plain ops"))
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
