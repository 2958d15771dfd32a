"""``qsdpa verify`` as a command, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qsdpa_patch
from qsdpa_patch import cli
from qsdpa_patch.demo.package_file import FetchError
from qsdpa_patch.verify import command
from tests.qsdpa_patch.demo.tiny_model import write_tiny_model


@pytest.fixture(name="model", scope="module")
def fixture_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


def test_the_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", model, "--tokens", "40", "--rotate", "--max-perplexity-increase", "1000"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for expected in ("4-bit g64, rotated, 40 tokens, 16 at a time", "unquantized", "mlx-lm", "plain ops", "mean KL"):
        assert expected in out
    assert not qsdpa_patch.is_enabled()


def test_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, file = tmp_path / "text", tmp_path / "verify.json"
    text.write_text("hello 12 hello", encoding="utf-8")
    options = ["--text", str(text), "--key-bits", "8", "--value-bits", "mxfp4", "--rotate", "keys", "--chunk", "3"]
    assert cli.main(["verify", model, *options, "--max-perplexity-increase", "1000", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["tokens"] == found["results"][0]["fidelity"]["positions"] < 14
    assert found["options"] == {
        "bits": 4, "group_size": 64, "key_bits": 8, "value_bits": "mxfp4", "rotate": "keys", "kernels": "auto",
    }  # fmt: skip
    base, ours = (found["results"][i]["fidelity"]["perplexity"] for i in (0, 2))
    assert found["results"][2]["perplexity_increase_percent"] == pytest.approx(100 * (ours / base - 1))
    assert found["beyond"] == []
    assert "K 8-bit g64 V mxfp4, keys rotated" in capsys.readouterr().out


def test_a_bound_that_is_not_met_is_an_exit_status_of_1(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tokens", "30", "--kv-bits", "2", "--max-mean-kl", "1e-9", "--json", "-"]
    assert cli.main(["verify", model, *options]) == 1
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["beyond"]) >= 2
    assert "qsdpa verify: qsdpa_patch: mean KL divergence is" in captured.err


def test_the_patch_is_off_for_mlx_lms_own_cache(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    qsdpa_patch.enable(key_bits=8)
    assert cli.main(["verify", model, "--tokens", "20", "--max-perplexity-increase", "1000", "--json", "-"]) == 0
    sizes = [row["cache_bytes"] for row in json.loads(capsys.readouterr().out)["results"]]
    assert sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "/nowhere/text"], "/nowhere/text"),
        (["--strange"], "unrecognized arguments"),
        (["--key-bits", "7"], "'7' is none of 2, 3, 4, 5, 6, 8, mxfp4"),
        (["--tokens", "1"], "1 is less than 2"),
        (["--json", "/nowhere/out.json"], "qsdpa verify: --json /nowhere/out.json: cannot be written"),
    ],
)
def test_bad_arguments(model: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = cli.main(["verify", model, *options])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_model_out_of_reach(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unreachable() -> Path:
        raise FetchError("no index")

    monkeypatch.setattr(command, "prepare_model", unreachable)
    assert cli.main(["verify"]) == 2
    assert "qsdpa verify: no index" in capsys.readouterr().err
