"""The models under test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qsdpa_patch.architectures.sizes import NEEDS_METAL, SIZES
from qsdpa_patch.architectures.tiny_models import build
from tests.architectures.measures import deviations, median
from tests.architectures.runs import CHUNKS, DECODED, prompt_and_reply, run

__all__ = ["BUILT", "MODEL_ERROR", "Subject", "make_subject"]

BUILT = [name for name in SIZES if name not in NEEDS_METAL]
"""What runs anywhere, and in float32: the Metal kernels of the others compute in bfloat16."""

MODEL_ERROR = {0.5: 2e-3, 0.9: 2e-2}
"""By quantile over positions: the deviation between two ways to compute the same, both over the same rounded rows.

It is about 1e-6, unless a last bit makes a number round to the neighbouring code: that row stays different."""


@dataclass(frozen=True)
class Subject:
    """A model, what it says unquantized with the patch off, and how much that depends on the prompt.

    effect: the median deviation of the logits of the reply when it follows another prompt.
    """

    architecture: str
    model: Any
    tokens: mx.array
    logits: mx.array
    effect: float


def make_subject(architecture: str) -> Subject:
    """Build the model, and run it with the patch off."""
    model, tokens = build(architecture), prompt_and_reply()
    logits = run(model, tokens).logits
    start = sum(CHUNKS)
    other = run(model, mx.concatenate([prompt_and_reply(1)[:, :start], tokens[:, start:]], axis=1)).logits
    return Subject(architecture, model, tokens, logits, median(deviations(other, logits)[-DECODED:]))
