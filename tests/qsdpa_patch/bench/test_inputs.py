"""The arrays that the suites run on."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qsdpa_patch.bench import cases
from qsdpa_patch.bench.cases import Case, buffer_sets, quantized_rows, random_rows, stock_format
from qsdpa_patch.bench.chaining import chained
from qsdpa_patch.kernels.format import Format

CASE = Case("decode", 1, 4, 2, 64, 64, 1, 10, mx.float32, Format.affine(4), Format.affine(4))


@pytest.mark.parametrize("count", [5, 4096, 4100, 9000])
def test_rows_repeat_a_tile(count: int) -> None:
    rows = random_rows(1, 2, count, 32, mx.float16)
    assert rows.shape == (1, 2, count, 32)
    assert rows.dtype == mx.float16
    period = 4096
    assert count <= period or mx.array_equal(rows[:, :, period:], rows[:, :, : count - period]).item()
    packed = quantized_rows(1, 2, count, 64, mx.float16, Format.affine(4))
    assert packed.shape == (1, 2, count, 64)
    assert packed.dtype == mx.float16


def test_sets_outgrow_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_ROTATED_BYTES", dict.fromkeys(cases._ROTATED_BYTES, 1000))
    made = iter(range(1000))
    assert buffer_sets(lambda: next(made), 300) == [0, 1, 2, 3]
    assert len(buffer_sets(lambda: next(made), 1 << 20)) == 1
    assert len(buffer_sets(lambda: next(made), 1)) == 64


def test_calls_of_a_run_depend_on_each_other() -> None:
    queries = mx.array([[[[1.0, 2.0]]]])
    run = chained(lambda x, k: x * k, queries, [2.0, 3.0, 5.0])
    assert run(1).tolist() == [[[[2.0, 4.0]]]]
    assert run(2).tolist() == [[[[15.0, 30.0]]]]  # goes on where the run before stopped
    assert run(4).tolist() == [[[[60.0, 120.0]]]]
    assert queries.tolist() == [[[[1.0, 2.0]]]]


def test_queries_survive_a_path_that_scales_them_in_place() -> None:
    def scaling(x: mx.array, k: float) -> mx.array:
        x *= k
        return x[..., :1]

    queries = mx.array([[[[1.0, 2.0]]]])
    run = chained(scaling, queries, [2.0])
    assert [run(1).item(), run(3).item()] == [2.0, 2.0]
    assert queries.tolist() == [[[[1.0, 2.0]]]]


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ((Format.affine(8), Format.affine(4)), "keys and values alike"),
        ((Format.named("mxfp4"), Format.named("mxfp4")), "no mxfp4 cache"),
        ((Format.affine(4, symmetric=True),) * 2, "no 4-bit g64 symmetric cache"),
        ((Format.affine(4, rotated=True),) * 2, "no 4-bit g64 rotated cache"),
    ],
)
def test_caches_that_mlx_lm_does_not_have(formats: tuple[Format, Format], message: str) -> None:
    case = Case("decode", 1, 4, 2, 64, 64, 1, 10, mx.float32, *formats)
    with pytest.raises(ValueError, match=message):
        stock_format(case)
    assert stock_format(CASE) == {"bits": 4, "group_size": 64}
