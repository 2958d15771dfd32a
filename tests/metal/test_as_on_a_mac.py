"""mlx-lm's own generation with the settings that a Mac has by default: new rows and attention go to the Metal kernels.

In the emulator, where there is no Mac.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import qsdpa_patch
from qsdpa_patch import routes
from qsdpa_patch.dispatcher import router
from qsdpa_patch.kernels import row_writing
from qsdpa_patch.kernels.metal import backend
from tests.metal import emulated_backend
from tests.metal.broken_kernels import failing_kernels, kernels_that_fail_late, wrong_kernels
from tests.metal.emulated_backend import emulated_row_quantization
from tests.metal.emulator import Cost, missing_tools
from tests.qsdpa_patch.demo.tiny_model import LAYERS, write_tiny_model

PROMPT = [40 + (7 * i) % 90 for i in range(21)]
TOKENS = 6


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return mlx_lm.load(str(write_tiny_model(tmp_path_factory.mktemp("model"))))[:2]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Cost]]:
    """The launches of the emulated kernels so far; none on a Mac."""
    if not mx.metal.is_available() and missing_tools():
        pytest.skip(missing_tools())
    monkeypatch.setattr(router, "_decisions", {})
    with emulated_row_quantization() as costs:
        if not mx.metal.is_available():
            monkeypatch.setattr(routes, "default_backend_name", lambda: "metal")
            monkeypatch.setattr(row_writing, "default_backend_name", lambda: "metal")
        row_writing._plan.cache_clear()
        yield costs
    row_writing._plan.cache_clear()


def generated(loaded: Any, **options: Any) -> list[int]:
    with qsdpa_patch.enabled(**options):
        responses = mlx_lm.stream_generate(
            *loaded, PROMPT, max_tokens=TOKENS, kv_bits=8, kv_group_size=32, quantized_kv_start=0, prefill_step_size=8
        )
        return [response.token for response in responses]


def test_text_is_generated_by_the_kernels(mac: list[Cost], loaded: Any) -> None:
    wanted = generated(loaded, kernels="ops")
    qsdpa_patch.reset_report()
    mac.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generated(loaded) == wanted
    calls = qsdpa_patch.report().calls
    assert calls["fused"] >= LAYERS * TOKENS
    assert calls["ops"] == 0
    if not mx.metal.is_available():
        launches = [cost.kernel for cost in mac]
        assert {"qsdpa_decode", "qsdpa_quantize_rows"} <= set(launches)


@pytest.mark.parametrize("kernels", [wrong_kernels, failing_kernels, kernels_that_fail_late])
def test_kernels_that_cannot_be_used_cost_a_warning_each_and_nothing_else(
    mac: list[Cost],
    loaded: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kernels: Callable[..., Any],
) -> None:
    wanted = generated(loaded, kernels="ops")
    monkeypatch.setattr(backend, "metal_kernel", kernels)
    forget()
    qsdpa_patch.reset_report()
    with warnings.catch_warnings(record=True) as given, caplog.at_level(logging.WARNING, "qsdpa_patch"):
        warnings.simplefilter("always")
        for _ in range(2):
            assert generated(loaded) == wanted
    texts = [str(warning.message) for warning in given if warning.category is RuntimeWarning]
    assert len(texts) == len(set(texts)) > 0
    assert len({record.getMessage() for record in caplog.records}) == len(caplog.records) > 0
    report = qsdpa_patch.report()
    assert report.calls["fused"] == 0
    assert all("the Metal kernel" in row.reason for row in report.rows if row.route == "ops")
    assert len(str(report).splitlines()) == 1 + len(report.rows) + len(report.notes)


def forget() -> None:
    """Kernels that were tried out before."""
    emulated_backend._forget_kernels()
    router._decisions.clear()
