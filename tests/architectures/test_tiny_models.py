"""The tiny models on a Mac, where mlx-lm has Metal kernels for recurrent and ternary layers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.layers.linear import Linear

from qsdpa_patch.architectures.sizes import SIZES
from qsdpa_patch.architectures.tiny_models import build

STATE_SPACE = ("falcon_h1", "granitemoehybrid", "nemotron_h", "plamo2")
GATED_DELTA = ("bailing_moe_v3", "kimi_k3", "kimi_linear", "olmo_hybrid", "qwen3_5", "qwen3_next")


@pytest.mark.parametrize("architecture", [*STATE_SPACE, *GATED_DELTA])
def test_rows_of_recurrent_states_fill_a_simd_group(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels give each of 32 lanes as many numbers of a row, and leave out the rest."""
    kernels = import_module(f"mlx_lm.models.{'ssm' if architecture in STATE_SPACE else 'gated_delta'}")
    name, place = ("ssm_attn", 2) if architecture in STATE_SPACE else ("gated_delta_ops", 1)
    lengths: set[int] = set()
    in_ops = getattr(kernels, name)

    def recording(*arguments: Any, **options: Any) -> Any:
        lengths.add(arguments[place].shape[-1])
        return in_ops(*arguments, **options)

    monkeypatch.setattr(kernels, name, recording)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    mx.eval(build(architecture)(mx.array([[1, 2, 3]])))
    assert lengths
    assert all(length % 32 == 0 for length in lengths)


def test_all_users_of_those_kernels_are_known() -> None:
    users = {
        name
        for name in SIZES
        if {"ssm_update", "gated_delta_update"} & set(vars(import_module(f"mlx_lm.models.{name}")))
    }
    assert users <= {*STATE_SPACE, *GATED_DELTA}, "add the new ones"


def test_ternary_layers_are_left_out_with_and_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (False, True):
        monkeypatch.setattr(mx.metal, "is_available", lambda available=available: available)
        assert type(build("bitnet").model.layers[0].self_attn.q_proj) is Linear
