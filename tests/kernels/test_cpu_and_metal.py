"""The CPU kernel and the Metal kernels (in the emulator, where there is no Mac) on the very same inputs."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.cpu import backend
from qsdpa_patch.kernels.format import Format
from tests.attention_cases import TOLERANCES, Case, build, expected, relative_error
from tests.metal.emulated_backend import emulated_backend
from tests.metal.emulator import missing_tools

CASES = [
    Case(seed=1, batch=2, kv_heads=2, group=4, count=130, capacity=150, mask="padding", dtype=mx.float16,
         outliers=True),
    Case(seed=2, group=2, length=3, count=75, capacity=75, dtype=mx.bfloat16, sinks=True, mask="causal",
         key_format=Format.affine(8, 32), value_format=Format.affine(4, 64, symmetric=True)),
    Case(seed=3, count=90, capacity=128, dtype=mx.float32, mask="additive",
         key_format=Format.named("mxfp4"), value_format=Format.affine(3, 32)),
    Case(seed=4, kv_heads=1, group=16, count=70, capacity=99, key_dim=256, value_dim=256, rope_dim=64,
         key_format=Format.affine(4, 64), value_format=Format.affine(4, 64), dtype=mx.float16),
]  # fmt: skip


@pytest.mark.skipif(not backend.is_available()[0], reason=backend.is_available()[1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_backends_agree(case: Case) -> None:
    if not mx.metal.is_available() and missing_tools():
        pytest.skip(missing_tools())
    call = build(case)
    with emulated_backend() as metal:
        assert metal.has_fused_kernel(call.signature) == (True, "")
        assert backend.has_fused_kernel(call.signature) == (True, "")
        on_metal, on_cpu, wanted = metal.attend(call), backend.attend(call), expected(call)
    tolerance = TOLERANCES[case.dtype]
    assert relative_error(on_metal, wanted) <= tolerance
    assert relative_error(on_cpu, wanted) <= tolerance
    assert relative_error(on_cpu, on_metal.astype(mx.float32)) <= 2 * tolerance
