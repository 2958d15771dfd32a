"""The arrays of a lane are in registers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.row_quantization import quantize_rows
from tests import attention_cases as cases
from tests.attention_cases import Case
from tests.metal.emulated_backend import emulated_backend, emulated_row_quantization
from tests.metal.emulator import missing_tools
from tests.metal.emulator.compiler import arrays_in_memory, build

pytestmark = [
    pytest.mark.skipif(mx.metal.is_available(), reason="a GPU does not tell"),
    pytest.mark.skipif(bool(missing_tools()), reason=missing_tools() or "the emulator runs here"),
]
FEW = Case(seed=1, group=4, count=75, capacity=90)
LATENT = Case(seed=1, kv_heads=1, group=20, count=75, capacity=90, key_dim=512, value_dim=512, rope_dim=64)
CASES = {
    "few rows: 1": replace(FEW, group=1, mask="bool"),
    "few rows: 2": replace(FEW, group=1, length=2, mask="causal", sinks=True),
    "few rows: 4": FEW,
    "few rows: 5 bits": replace(FEW, key_format=Format.affine(5, 32), value_format=Format.affine(3, 32)),
    "few rows: 4-bit floats": replace(FEW, key_format=Format.named("mxfp4"), value_format=Format.named("nvfp4")),
    "matrices": replace(FEW, group=8, mask="additive"),
    "matrices: 8-bit floats": replace(FEW, group=16, key_format=Format.named("mxfp8")),
    "matrices, a team": replace(FEW, group=16, value_dim=256),
    "matrices, many rows": replace(FEW, length=40, mask="causal"),
    "latent": LATENT,
    "latent, many heads": replace(LATENT, group=128, key_dim=256, value_dim=256),
}
Source = tuple[str, str, list[tuple[str, str]]]


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """What the emulator builds: source, name of the function, template arguments."""
    built: list[Source] = []

    def record(*kernel: Any) -> Path:
        built.append(kernel)
        return build(*kernel)

    monkeypatch.setattr("tests.metal.emulator.metal_kernel.build", record)
    return built


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_attention(sources: list[Source], case: Case) -> None:
    with emulated_backend() as emulated:
        mx.eval(emulated.attend(cases.build(case), keys_per_split=32))
    assert len(sources) == 2  # one part of the keys each, and their merge
    assert [arrays_in_memory(*source) for source in sources] == [[], []]


@pytest.mark.parametrize("format", [Format.affine(5), Format.affine(4, rotated=True), Format.named("nvfp4")], ids=str)
def test_quantization_of_rows(sources: list[Source], format: Format) -> None:
    with emulated_row_quantization():
        mx.eval(quantize_rows([mx.zeros((1, 2, 3, 128), mx.float16)] * 2, format))
    assert sources
    assert not any(arrays_in_memory(*source) for source in sources)


def test_an_index_known_at_run_time_is_found() -> None:
    body = "float a[4] = {x[0], x[1], x[2], x[3]}; y[i] = a[i % 4];"
    parameters = "const device float* x [[buffer(0)]], device float* y [[buffer(1)]]"
    source = f"kernel void f({parameters}, uint i [[thread_index_in_simdgroup]]) {{ {body} }}"
    assert arrays_in_memory(source, "f") == ["[4 x float]"]
