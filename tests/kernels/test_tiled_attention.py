"""Attention in tiles of ops against the float32 reference, at budgets that cut it in every direction."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qsdpa_patch.kernels import tiled_attention
from tests import attention_cases as cases

BUDGETS = (1, 200_000, 2_000_000, 1 << 30)


@pytest.mark.parametrize("seed", range(80))
def test_tiles_equal_the_reference(seed: int) -> None:
    case = cases.random_case(seed, max_count=3000 if seed % 8 == 0 else 300, max_length=60)
    call = cases.build(case)
    actual = tiled_attention.attend(call, BUDGETS[seed % len(BUDGETS)])
    assert actual.dtype == case.dtype
    assert cases.relative_error(actual, cases.expected(call)) <= cases.TOLERANCES[case.dtype], str(case)


@pytest.mark.parametrize("seed", range(12))
def test_tiles_equal_the_reference_with_a_rope_term(seed: int) -> None:
    case = cases.random_mla_case(seed)
    call = cases.build(case)
    actual = tiled_attention.attend(call, BUDGETS[seed % len(BUDGETS)])
    assert cases.relative_error(actual, cases.expected(call)) <= cases.TOLERANCES[case.dtype], str(case)


def test_tiles_work_where_nothing_can_be_evaluated() -> None:
    call = cases.build(cases.Case(seed=3, length=40, count=3000, capacity=3000, mask="causal"))
    attend = mx.compile(lambda: tiled_attention.attend(call, 1))
    assert cases.relative_error(attend(), cases.expected(call)) <= 1e-5
