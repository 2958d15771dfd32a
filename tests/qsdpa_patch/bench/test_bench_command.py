"""``qsdpa bench`` end to end, on the CPU and small enough to be quick."""

from __future__ import annotations

import argparse
import builtins
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

import qsdpa_patch
from qsdpa_patch import callers
from qsdpa_patch.bench import append_suite, command, runner
from qsdpa_patch.bench.limits import DeviceLimits
from qsdpa_patch.bench.measurement import measure
from qsdpa_patch.bench.model_suite import RANDOM_MODELS
from tests.qsdpa_patch.demo.tiny_model import write_tiny_model

SMALL = ("--device", "cpu", "--heads", "4", "--kv-heads", "2", "--head-dim", "64", "--seconds", "0")
QUANTIZED = "mlx-lm quantized"
LIMITS = DeviceLimits(1e10, 1e9, threads=2)


def bench(*options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*SMALL, *options]))


def bench_as_json(path: Path, *options: str) -> dict[str, Any]:
    assert bench(*options, "--json", str(path)) == 0
    data: dict[str, Any] = json.loads(path.read_text())
    return data


@pytest.fixture(name="small_and_quick", autouse=True)
def fixture_small_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    device = mx.default_device()
    monkeypatch.setattr("qsdpa_patch.bench.cases._MAX_SETS", 2)
    monkeypatch.setattr("qsdpa_patch.bench.runner.measure_device_limits", lambda: LIMITS)
    yield
    mx.set_default_device(device)


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bench_as_json(tmp_path / "out.json", "--context", "33", "64", "--bits", "4", "8")
    assert data["schema"] == 1
    assert set(data) == {"schema", "command", "started", "machine", "limits", "results"}
    assert set(data["machine"]["versions"]) == {"qsdpa-patch", "mlx", "mlx-lm"}
    assert data["machine"]["device"] == "cpu"
    assert [(r["key_format"], r["context"]) for r in data["results"]] == [
        (f"{bits}-bit g64", context) for bits in (4, 8) for context in (33, 64)
    ]
    for result in data["results"]:
        ours, quantized, dequantized, plain = result["paths"]
        names = [path["name"] for path in result["paths"]]
        assert names == ["qsdpa_patch", QUANTIZED, "dequantize + SDPA", "SDPA, float32 cache"]
        assert ours["route"] in ("fused", "ops")
        assert (ours["route"] == "fused") == (ours["reason"] is None)
        assert 0 <= ours["difference"] < 1e-5
        row = 64 * (4 if result["key_format"].startswith("4") else 8) // 8 + 8  # codes; a float32 scale and bias
        assert (
            ours["bytes_read"]
            == quantized["bytes_read"]
            == dequantized["bytes_read"]
            == 2 * 2 * result["context"] * row
        )
        assert plain["bytes_read"] == 2 * 2 * result["context"] * 64 * 4
        for path in result["paths"]:
            assert path["error"] is None
            assert len(path["seconds_per_call"]) == 3
            assert path["minimum"] <= path["lower_quartile"] <= path["median"] <= path["upper_quartile"]
            assert path["bytes_per_second"] == path["bytes_read"] / path["median"]
            assert path["multiply_adds"] == 4 * result["context"] * (64 + 64)
            least = max(path["bytes_read"] / LIMITS.bytes_per_second, path["multiply_adds"] / 1e9)
            assert path["of_limit"] == least / path["median"]
            if path is ours:
                assert path["slower_than_ours"] is None
            else:
                assert path["slower_than_ours"] == path["median"] / ours["median"]
    printed = capsys.readouterr().out
    for expected in ("decode: B1 Hq4 Hkv2 D64 L1, 8-bit g64, float32", "qsdpa_patch", QUANTIZED, "speed-up"):
        assert expected in printed


@pytest.mark.parametrize(
    ("info", "printed"),
    [
        ({"device_name": "Apple M3 Max", "memory_size": 36 << 30}, "Apple M3 Max (cpu, 36 GiB), "),
        ({"device_name": "NVIDIA H200", "total_memory": 140 << 30}, "NVIDIA H200 (cpu, 140 GiB), "),
        ({"device_name": "Some CPU"}, "Some CPU (cpu), "),
    ],
)
def test_the_machine_is_told_with_its_memory(
    info: dict[str, Any], printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLX has it under different names on Metal and CUDA. Macs of one name have different numbers of cores."""
    monkeypatch.setattr(mx, "device_info", lambda *_: info)
    assert bench("--context", "33") == 0
    assert capsys.readouterr().out.startswith(printed)


def test_json_holds_the_cases_before_one_that_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_once(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(runner, "measure", out_of_memory)
        return measure(*args, **kwargs)

    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(runner, "measure", measure_once)
    file = tmp_path / "out.json"
    with pytest.raises(MemoryError):
        bench("--context", "33", "64", "--json", str(file))
    (result,) = json.loads(file.read_text())["results"]
    assert result["context"] == 33


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_cases", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(command, "load_pyplot", lambda: None)
    for path in (tmp_path / "missing" / "out", tmp_path):
        assert bench(option, str(path)) == 2
        assert f"qsdpa bench: {option} {path}: cannot be written" in capsys.readouterr().err


def test_rows_are_stored_as_a_model_stores_them() -> None:
    assert callers._reads_so(append_suite._store.__code__)


@pytest.mark.parametrize("suite", ["prefill", "append", "e2e"])
def test_other_suites(suite: str, tmp_path: Path) -> None:
    rows = "20" if suite == "prefill" else "1"
    options = ("--suite", suite, "--context", "40", "--query-length", rows, "--layers", "1", "--calls", "2")
    (result,) = bench_as_json(tmp_path / "out.json", *options)["results"]
    assert result["suite"] == suite
    assert [path["error"] for path in result["paths"]] == [None] * len(result["paths"])
    assert all(path["median"] > 0 for path in result["paths"])
    if suite != "append":
        assert result["paths"][0]["route"] in ("fused", "prefill", "ops")


def test_latent_attention_fails_in_stock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--suite", "mla", "--head-dim", "256", "--context", "40")
    (result,) = bench_as_json(tmp_path / "out.json", *options)["results"]
    ours, quantized, dequantized, plain = result["paths"]
    assert "'tuple' object has no attribute 'swapaxes'" in quantized["error"]
    assert quantized["seconds_per_call"] == []
    assert "median" not in quantized
    assert ours["difference"] < 1e-5
    assert dequantized["error"] is plain["error"] is None
    assert "mlx-lm quantized fails: AttributeError" in capsys.readouterr().out


def test_keys_and_values_apart(tmp_path: Path) -> None:
    options = ("--key-bits", "8", "--value-bits", "mxfp4", "--context", "40")
    for suite in ("decode", "append", "e2e"):
        (result,) = bench_as_json(tmp_path / "out.json", "--suite", suite, *options, "--layers", "1")["results"]
        errors = {path["name"]: path["error"] for path in result["paths"]}
        assert errors.pop(QUANTIZED) == "ValueError: mlx-lm quantizes keys and values alike"
        assert not any(errors.values())


def test_rotated(tmp_path: Path) -> None:
    for suite in ("decode", "mla", "append", "e2e"):
        options = ("--suite", suite, "--rotate", "--context", "40", "--layers", "1")
        (result,) = bench_as_json(tmp_path / "out.json", *options)["results"]
        errors = {path["name"]: path["error"] for path in result["paths"]}
        assert errors.pop(QUANTIZED) == "ValueError: mlx-lm has no 4-bit g64 rotated cache"
        assert not any(errors.values())
        assert suite in ("append", "e2e") or result["paths"][0]["difference"] < 1e-5


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "model"))
    options = ("--suite", "e2e", "--model", model, "--dtype", "float16", "--context", "40")
    (result,) = bench_as_json(tmp_path / "out.json", *options)["results"]
    assert all(path["error"] is None for path in result["paths"])
    assert result["model"] == "model"


def test_a_model_of_random_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = RANDOM_MODELS["llama-8b"] | {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256}
    monkeypatch.setitem(RANDOM_MODELS, "llama-8b", shape)
    attention = llama.scaled_dot_product_attention
    options = ("--suite", "e2e", "--model", "llama-8b", "--context", "40")
    (result,) = bench_as_json(tmp_path / "out.json", *options)["results"]
    assert {path["name"]: path["error"] for path in result["paths"]}["attention left out"] is None
    assert result["model"] == "llama-8b"
    assert llama.scaled_dot_product_attention is attention


def test_stock_is_timed_as_it_is_though_the_patch_was_on(tmp_path: Path) -> None:
    qsdpa_patch.enable()
    (result,) = bench_as_json(tmp_path / "out.json", "--suite", "e2e", "--context", "40", "--layers", "1")["results"]
    routes = {path["name"]: path["route"] for path in result["paths"]}
    assert routes.pop("qsdpa_patch")
    assert not any(routes.values())


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib, an optional dependency")
    path = tmp_path / "out.png"
    assert bench("--context", "33", "64", "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", without_matplotlib)
    assert bench("--plot", str(tmp_path / "out.png")) == 2
    assert "pip install 'qsdpa-patch[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--bits", "7"), "bits=7"), (("--suite", "e2e", "--model", "/nowhere/at/all"), "/nowhere/at/all")],
)
def test_bad_options(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*options) == 2
    assert message in capsys.readouterr().err


def test_json_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--context", "33", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1
