"""``qsdpa demo`` on a tiny model of one's own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from qsdpa_patch.demo import command
from qsdpa_patch.demo.package_file import FetchError
from tests.qsdpa_patch.demo.tiny_model import HEAD_DIM, KV_HEADS, LAYERS, write_tiny_model


@pytest.fixture(name="model", scope="module")
def fixture_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


def demo(*options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(options))


def test_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "demo.json"
    options = ("--max-tokens", "6", "--text-tokens", "40", "--kv-bits", "8", "4", "--json", str(path))
    assert demo("--model", model, *options) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    for expected in ("8-bit", "4-bit", "KL divergence, mean", "tokens per second", "report()", "llama"):
        assert expected in printed
    result = json.loads(path.read_text())
    plain, eight, four = result["results"]
    assert [r["bits"] for r in result["results"]] == [None, 8, 4]
    assert result["dtype"] == "float32"
    float16 = 256 * 2 * LAYERS * KV_HEADS * HEAD_DIM * 2  # positions, K and V, layers, heads, dims, bytes
    assert {r["float16_bytes"] for r in result["results"]} == {float16}
    assert plain["cache_bytes"] == 2 * float16  # in float32
    assert eight["cache_bytes"] == float16 * (8 + 64 / 64) / 16
    assert four["cache_bytes"] == float16 * (4 + 64 / 64) / 16
    assert plain["fidelity"]["mean_kl"] == 0 < eight["fidelity"]["mean_kl"] < four["fidelity"]["mean_kl"]
    assert all(len(r["generation"]["tokens"]) == 6 for r in result["results"])
    calls = result["report"]["calls"]
    assert calls["fused"] + calls["prefill"] + calls["ops"] > 0


def test_json_to_standard_output(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--model", model, "--max-tokens", "2", "--text-tokens", "3", "--kv-bits", "4", "--json", "-") == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == 2


def test_rotation_and_group_size_reach_the_caches(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    divergences = set()
    for options in ((), ("--rotate",), ("--kv-group-size", "32")):
        assert demo("--model", model, "--max-tokens", "2", "--kv-bits", "4", "--json", "-", *options) == 0
        divergences.add(json.loads(capsys.readouterr().out)["results"][1]["fidelity"]["mean_kl"])
    assert len(divergences) == 3


def test_registry_out_of_reach(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unreachable(dtype: object) -> Path:
        raise FetchError("no index; use --model")

    monkeypatch.setattr(command, "prepare_model", unreachable)
    assert demo() == 1
    assert demo("--prepare") == 1
    assert capsys.readouterr().err.count("qsdpa demo: no index; use --model") == 2


def test_model_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert demo("--model", str(tmp_path / "empty")) == 1
    assert "qsdpa demo:" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_load", lambda *_: pytest.fail("loaded"))
    path = tmp_path / "missing" / "out.json"
    assert demo("--json", str(path)) == 1
    assert f"qsdpa demo: --json {path}: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--kv-bits", "7"), ("--max-tokens", "0"), ("--kernels", "fast")])
def test_bad_options(options: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo(*options)
    assert options[0] in capsys.readouterr().err
