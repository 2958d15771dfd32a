"""The reference in ops against attention written out in NumPy."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qsdpa_patch.kernels import reference
from qsdpa_patch.kernels.attention_call import AttentionCall
from tests import attention_cases as cases


def attention_in_numpy(call: AttentionCall) -> np.ndarray[Any, Any]:
    """One query row at a time, in float64."""
    keys, values = (x.dequantize(mx.float32, stored=True) for x in (call.keys, call.values))
    q, k, v = (np.array(x.astype(mx.float32), np.float64) for x in (call.queries, keys, values))
    batch, heads, length, _ = q.shape
    count, group = k.shape[2], heads // k.shape[1]
    out = np.zeros((batch, heads, length, v.shape[-1]))
    mask = None
    if isinstance(call.mask, mx.array):
        mask = np.array(call.mask if call.mask.dtype == mx.bool_ else call.mask.astype(mx.float32))
        mask = np.broadcast_to(mask, (batch, heads, length, count))
    for b, h, i in np.ndindex(batch, heads, length):
        scores = call.scale * k[b, h // group] @ q[b, h, i]
        if call.rope is not None:
            rq, rk = (np.array(x.astype(mx.float32), np.float64) for x in (call.rope.queries, call.rope.keys))
            scores = scores + rk[b, 0] @ rq[b, h, i]
        if isinstance(call.mask, str):
            scores[np.arange(count) > count - length + i] = -np.inf
        elif mask is not None and mask.dtype == bool:
            scores[~mask[b, h, i]] = -np.inf
        elif mask is not None:
            scores = scores + mask[b, h, i]
        weights = np.exp(scores) if np.isfinite(scores).any() else np.zeros(count)
        total = weights.sum() + (np.exp(float(call.sinks[h].astype(mx.float32))) if call.sinks is not None else 0)
        out[b, h, i] = weights @ v[b, h // group] / (total or 1)
    return out


def assert_close(actual: mx.array, wanted: np.ndarray[Any, Any], case: str) -> None:
    assert np.abs(np.array(actual) - wanted).max() <= 1e-5 * np.abs(wanted).max(), case


@pytest.mark.parametrize("seed", range(60))
def test_reference_equals_numpy(seed: int) -> None:
    case = cases.random_case(seed, max_count=90)
    call = cases.build(case)
    assert_close(cases.expected(call), attention_in_numpy(call), str(case))


@pytest.mark.parametrize("seed", range(8))
def test_reference_equals_numpy_with_a_rope_term(seed: int) -> None:
    case = cases.random_mla_case(seed, max_count=60)
    call = cases.build(case)
    assert_close(cases.expected(call), attention_in_numpy(call), str(case))


@pytest.mark.parametrize("seed", range(30))
def test_reference_in_the_models_dtype_is_within_tolerance(seed: int) -> None:
    case = cases.random_case(seed, max_count=300)
    call = cases.build(case)
    error = cases.relative_error(reference.attend(call), cases.expected(call))
    assert error <= cases.TOLERANCES[case.dtype], f"{case}: {error:.1e}"
