"""The table of ``qsdpa doctor --architectures``."""

from __future__ import annotations

import json

import pytest

from qsdpa_patch.architectures import table as table_module
from qsdpa_patch.architectures.table import TableRow, table
from qsdpa_patch.cli import main


def cells(architecture: str) -> dict[str, tuple[str, str]]:
    return {row.layers: (row.cache, row.reason) for row in table([architecture])}


def test_plain_layers_need_no_reason() -> None:
    assert cells("gemma4") == {
        "sliding": ("QuantizedRotatingKVCache", ""),
        "full": ("QuantizedKVCache", ""),
        "shared": ("that of another layer", ""),
    }


def test_kept_and_dequantized_layers_have_theirs() -> None:
    assert cells("minimax_m3_vl")["indexer"][1].startswith("kept unquantized: ")
    assert cells("gemma2")["full"][1].startswith("quantized, and read as a dequantized array: ")
    assert cells("mistral4")["latent"][1].startswith("prompts: ")
    assert cells("rwkv7") == {"-": ("-", "not tried: no attention: a recurrent model")}


def test_an_architecture_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(architecture: str, **options: object) -> object:
        raise RuntimeError("no such weights")

    monkeypatch.setattr(table_module, "build", build)
    rows = list(table(["llama", "mamba"]))
    assert rows[0] == TableRow("llama", "-", "-", "-", "-", "fails: no such weights")
    assert [row.is_failure for row in rows] == [True, False]


def test_the_doctor_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--architectures", "llama4", "gpt_oss"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["architecture", "layers", "cache", "decode", "prompt", "reason"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["llama4", "chunked"], ["llama4", "full"], ["gpt_oss", "sliding"], ["gpt_oss", "full"],
    ]  # fmt: skip
    assert main(["doctor", "--architectures", "gpt2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["cache"] == "QuantizedKVCache"
