"""Layers with small windows are left alone where ``keep_windows`` says so."""

from __future__ import annotations

import pytest

import qsdpa_patch
from qsdpa_patch.architectures.sizes import WINDOW
from qsdpa_patch.architectures.table import leaves
from qsdpa_patch.architectures.tiny_models import build
from qsdpa_patch.settings import resolve_settings
from tests.architectures.runs import prompt_and_reply, run


@pytest.mark.parametrize(("architecture", "kind", "plain"), [
    ("gpt_oss", "sliding", "RotatingKVCache"), ("llama4", "chunked", "ChunkedKVCache"),
])  # fmt: skip
@pytest.mark.parametrize("limit", [WINDOW - 1, WINDOW])
def test_windows_up_to_the_limit_are_kept(architecture: str, kind: str, plain: str, limit: int) -> None:
    with qsdpa_patch.enabled(keep_windows=limit):
        caches = run(build(architecture), prompt_and_reply()[:, :60], bits=4).caches
    classes = {type(cache).__qualname__ for cache in leaves(caches)}
    kept = (plain,) if limit == WINDOW else ()
    assert classes == {"QuantizedKVCache", *(kept or (f"Quantized{plain}",))}
    notes = [(kind_, note) for _, kind_, note in qsdpa_patch.report().notes]
    said = f"kept unquantized: keep_windows={limit} says so for windows of {WINDOW} rows"
    assert notes == [(kind, said) for _ in kept]


def test_the_option_and_its_variable() -> None:
    assert resolve_settings(environment={}).keep_windows == 0
    assert resolve_settings(environment={"QSDPA_KEEP_WINDOWS": "512"}).keep_windows == 512
    assert resolve_settings(keep_windows=64, environment={"QSDPA_KEEP_WINDOWS": "512"}).keep_windows == 64
    with pytest.raises(ValueError, match=r"keep_windows=-1 is no number of rows: give 0 or more"):
        resolve_settings(keep_windows=-1, environment={})
    with pytest.raises(ValueError, match=r"QSDPA_KEEP_WINDOWS='many' is no number of rows"):
        resolve_settings(environment={"QSDPA_KEEP_WINDOWS": "many"})
