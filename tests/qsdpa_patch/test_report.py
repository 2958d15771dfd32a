"""The report as data and as a table."""

from __future__ import annotations

import json

from qsdpa_patch.report import Recorder, Report


def filled() -> Recorder:
    recorder = Recorder()
    for _ in range(3):
        recorder.record("llama", "full", "fused", "", "")
    recorder.record("llama", "full", "ops", "head_dim 80", "q [1, 4, 1, 80]")
    recorder.stock_calls["mlx_lm.models.qwen3"] = 5
    recorder.note("gemma2", "full", "read as an array")
    return recorder


def test_counts() -> None:
    report = filled().report()
    assert report.calls == {"fused": 3, "prefill": 0, "ops": 1, "stock": 5}
    data = report.to_dict()
    assert data["rows"][0] == {
        "model_type": "llama", "layer_kind": "full", "route": "fused", "reason": "", "calls": 3, "example": "",
    }  # fmt: skip
    assert json.loads(json.dumps(data)) == data


def test_table() -> None:
    lines = str(filled().report()).splitlines()
    assert lines[0].split()[:4] == ["model", "layers", "route", "calls"]
    assert any("ops" in line and "head_dim 80 (q [1, 4, 1, 80])" in line for line in lines)
    assert lines[-1] == "gemma2 full: read as an array"
    assert str(Report()) == "no attention calls yet"


def test_a_snapshot_does_not_move_and_reset_clears() -> None:
    recorder = filled()
    before = recorder.report()
    recorder.reset()
    assert before.calls["fused"] == 3
    assert recorder.report() == Report()
