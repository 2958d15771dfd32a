"""Every architecture in a batch of three sequences of different lengths, over quantized caches."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qsdpa_patch
from tests.architectures.batches import PROMPTS, run_batch, sequences
from tests.architectures.measures import deviations, median, quantile
from tests.architectures.subjects import MODEL_ERROR, Subject

BITS = 4
QUANTIZATION_ERROR = 0.5
"""The median deviation from the unquantized batch, as a share of the effect of another prompt.

Batches are quantized from their first token on, so that it is more than for single sequences: 0.1 to 0.43, measured."""

REFUSED = {
    "deepseek_v41": "its own cache class has no merge",
    "gemma2": "its scores have 5 dimensions, the mask of a batch has 4",
    "gpt_bigcode": "it takes the offsets of a batch for a number",
    "llama4": "chunked caches have no merge",
    "phi3small": "its scores have 5 dimensions, the mask of a batch has 4",
}
"""Architectures that mlx-lm itself cannot run in batches, with the reason."""

MIXED = {
    "afm7": "layers with shared keys rotate queries by the position in the batch",
    "baichuan_m1": "its convolution runs over the padding",
    "bailing_moe_linear": "its linear attention runs over the padding",
    "jamba": "its state space runs over the padding",
    "longcat_flash_ngram": "its n-grams take in the padding",
    "minimax_m3_vl": "its blocks of keys are cut by the position in the batch",
    "nemotron_h": "its state space runs over the padding",
    "olmo_hybrid": "its linear attention runs over the padding",
    "recurrent_gemma": "its recurrence runs over the padding",
}
"""Architectures that in mlx-lm itself say other things in a batch than alone, with the reason."""


def test_batches(subject: Subject) -> None:
    tokens = sequences()
    if subject.architecture in REFUSED:
        check_refused(subject, tokens)
        return
    expected = run_batch(subject.model, tokens)
    with qsdpa_patch.enabled():
        batch = run_batch(subject.model, tokens, BITS)
    error = median(mx.concatenate([deviations(*pair) for pair in zip(batch, expected)]))
    assert error <= QUANTIZATION_ERROR * subject.effect
    shortest = PROMPTS.index(min(PROMPTS))
    if subject.architecture in MIXED:
        alone = run_batch(subject.model, [tokens[shortest]])[0]
        assert quantile(deviations(expected[shortest], alone), 0.9) > MODEL_ERROR[0.9]
        return
    with qsdpa_patch.enabled():
        alone = run_batch(subject.model, [tokens[shortest]], BITS)[0]
    apart = deviations(batch[shortest], alone)
    for share, bound in MODEL_ERROR.items():
        assert quantile(apart, share) <= bound


def check_refused(subject: Subject, tokens: list[list[int]]) -> None:
    with pytest.raises(ValueError):
        run_batch(subject.model, tokens)
    with qsdpa_patch.enabled(), pytest.raises(ValueError):
        run_batch(subject.model, tokens, BITS)
