"""The CUDA benchmark, as far as it goes without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest

from qsdpa_patch.kernels import reference
from qsdpa_patch.kernels.cuda import backend, benchmark
from qsdpa_patch.kernels.cuda.benchmark import SHAPES, Problem, Shape

_SMALL = Shape(query_heads=4, kv_heads=2, length=3, dim=128, count=40)


def test_operations_are_those_that_the_causal_mask_leaves() -> None:
    kept = reference.causal_mask(_SMALL.length, _SMALL.count).sum().item()
    assert _SMALL.operations == 2 * _SMALL.query_heads * kept * (128 + 128)
    assert Shape(length=1, count=10, dim=64).operations == 2 * 32 * 10 * (64 + 64)


@pytest.mark.parametrize("value_dim", [0, 64])
def test_each_call_takes_the_output_of_the_last(value_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows of the output are shorter than those of queries."""
    queries: list[mx.array] = []

    def three_calls(step: Callable[[mx.array, int], mx.array], start: mx.array, *_: object) -> float:
        queries[:] = [start]
        for i in range(3):
            queries.append(step(queries[-1], i))
        return 1.0

    monkeypatch.setattr(benchmark, "_CACHE_BYTES", 1)
    monkeypatch.setattr(benchmark, "time_calls", three_calls)
    monkeypatch.setattr(backend, "attend", reference.attend)
    problem = Problem(replace(_SMALL, value_dim=value_dim))
    results = []
    for measure in (problem.fused, problem.stock, problem.dequantized):
        measure()
        assert {x.shape for x in queries} == {problem.queries.shape}
        results.append(queries[-1].astype(mx.float32))
    for other in results[1:]:
        assert mx.allclose(other, results[0], atol=0.02).item()


def test_shapes_have_names_of_their_own() -> None:
    assert len({str(shape) for shape in SHAPES.values()}) == len(SHAPES)
