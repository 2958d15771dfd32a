"""The command line, and what the doctor finds."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

import qsdpa_patch
from qsdpa_patch import activation, cli
from qsdpa_patch.doctor import findings


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    for name in cli._COMMANDS:
        assert name in out
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == qsdpa_patch.__version__


def test_an_unknown_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["cure"])
    assert stop.value.code == 2
    assert "invalid choice: 'cure'" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    topics = {f["topic"] for f in found}
    assert {"versions", "device", "start-up hook", "environment", "patching", "kernels", "models"} <= topics
    assert status == int(any(f["fix"] for f in found))
    decided = [f["text"] for f in found if "decode D" in f["text"]]
    assert len(decided) == 10
    assert all("fused" in text or "ops: " in text for text in decided)
    appended = [f["text"] for f in found if "append D" in f["text"]]
    assert len(appended) == 2
    assert all("one kernel" in text or "ops: " in text for text in appended)
    assert not qsdpa_patch.is_enabled()


def test_doctor_names_problems_with_their_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QSDPA_KEY_BITS", "7")
    monkeypatch.setattr(activation, "version", lambda name: "0.1.0")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "Problem: QSDPA_KEY_BITS=7 is not supported" in out
    assert "Fix: correct or unset the variable" in out
    assert "mlx-lm 0.1.0 is not tested" in out


def test_doctor_shapes_are_those_of_calls() -> None:
    """The signature it asks about is the one that a call of that kind has."""
    from qsdpa_patch import Format, quantize
    from qsdpa_patch.kernels.attention_call import check_call

    signature = findings._decode_signature(80, Format.affine(4, 64))
    keys = quantize(mx.zeros((1, 8, 10, 80), signature.dtype), Format.affine(4, 64))
    values = quantize(mx.zeros((1, 8, 10, 80), signature.dtype), Format.affine(4, 64))
    call = check_call(mx.zeros((1, 32, 1, 80), signature.dtype), keys, values, scale=1.0)
    assert call.signature == signature
