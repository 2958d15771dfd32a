"""The CUDA benchmark, as far as it goes without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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


def test_the_figures_are_written_after_each_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that ends early keeps what it measured."""
    figures: dict[str, float | str] = {
        "megabytes": 151.0,
        "fused": 40.0,
        "stock": 800.0,
        "dequantized": "failed: x",
        "unquantized": 120.0,
    }
    measured: list[Shape] = []

    def measure(shape: Shape, *_: object) -> dict[str, float | str]:
        measured.append(shape)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return {"shape": str(shape), **figures}

    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(benchmark, "_measure", measure)
    file = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["benchmark", "--json", str(file), "4bit", "8bit", "mha"])
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    assert measured == [SHAPES[name] for name in ("4bit", "8bit", "mha")]
    data = json.loads(file.read_text())
    assert data["bandwidth"] == 4e12
    assert [(row["name"], row["fused"], row["stock"]) for row in data["rows"]] == [
        ("4bit", 40, 800),
        ("8bit", 40, 800),
    ]


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda: pytest.fail("measured"))
    file = tmp_path / "missing" / "figures.json"
    monkeypatch.setattr("sys.argv", ["benchmark", "--json", str(file)])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert stop.value.code == 2
    assert f"--json {file}: cannot be written" in capsys.readouterr().err


def test_a_row_of_the_table() -> None:
    row: dict[str, float | str] = {"shape": "S", "megabytes": 172.0, "fused": 80.0, "stock": 800.0, "unquantized": "no"}
    assert benchmark._table_row(row, SHAPES["4bit"], 4.3e12) == "| S | 172 | 80.0 | 50% | 27 | 800.0 (10.0x) | - | no |"
    assert benchmark._table_row({**row, "reason": "why"}, SHAPES["4bit"], 4.3e12) == "| S | 172 | why |"


def test_shapes_have_names_of_their_own() -> None:
    assert len({str(shape) for shape in SHAPES.values()}) == len(SHAPES)
