"""The CPU kernel against the reference, over everything it takes."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.cpu import backend
from tests.attention_cases import (
    TOLERANCES,
    Case,
    build,
    expected,
    random_case,
    random_mla_case,
    relative_error,
)

pytestmark = pytest.mark.skipif(not backend.is_available()[0], reason=backend.is_available()[1])


def check(case: Case) -> None:
    call = build(case)
    assert backend.has_fused_kernel(call.signature) == (True, "")
    out = backend.attend(call)
    assert out.dtype == case.dtype
    assert relative_error(out, expected(call)) <= TOLERANCES[case.dtype], str(case)


@pytest.mark.parametrize("block", range(8))
def test_decode_sweep(block: int) -> None:
    for seed in range(block * 40, block * 40 + 40):
        check(random_case(seed))


@pytest.mark.parametrize("block", range(4))
def test_prefill_sweep(block: int) -> None:
    for seed in range(1000 + block * 8, 1000 + block * 8 + 8):
        check(random_case(seed, max_length=300))


@pytest.mark.parametrize("block", range(4))
def test_mla_sweep(block: int) -> None:
    for seed in range(block * 10, block * 10 + 10):
        check(random_mla_case(seed))


def test_inputs_may_be_lazy() -> None:
    call = build(random_case(5))
    lazy = mx.concatenate([call.queries, call.queries], axis=1)[:, : call.queries.shape[1]]
    out = backend.attend(replace(call, queries=lazy))
    assert relative_error(out, expected(call)) <= TOLERANCES[call.queries.dtype]
