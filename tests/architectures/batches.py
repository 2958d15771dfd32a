"""Sequences of different lengths through mlx-lm's ``BatchGenerator``, with the reply given instead of sampled."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx

from qsdpa_patch.architectures.sizes import VOCABULARY

PROMPTS = (41, 13, 30)
"""Their lengths: two of them cross the windows of 24 rows, one only in its reply."""
REPLY = 14
PREFILL_STEP = 19

_generate = import_module("mlx_lm.generate")  # mlx_lm has a function of that name


def sequences() -> list[list[int]]:
    """Prompts, each with its reply."""
    drawn = (mx.random.randint(0, VOCABULARY, (length + REPLY,), key=mx.random.key(length)) for length in PROMPTS)
    return [list(map(int, tokens)) for tokens in drawn]


def run_batch(model: Any, tokens: list[list[int]], bits: int | None = None) -> list[mx.array]:
    """Log-probabilities ``[REPLY, vocabulary]`` of each sequence, all generated at once.

    Args:
        bits: of the quantized cache, for which the patch must be on; ``None`` for mlx-lm's own.
    """
    options = {} if bits is None else {"kv_bits": bits}
    generator = _generate.BatchGenerator(model, prefill_step_size=PREFILL_STEP, **options)
    uids = generator.insert(
        [sequence[:-REPLY] for sequence in tokens],
        max_tokens=[REPLY] * len(tokens),
        samplers=[_says(sequence[-REPLY:]) for sequence in tokens],
    )
    logprobs: dict[int, list[mx.array]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            logprobs[response.uid].append(response.logprobs)
    return [mx.stack(logprobs[uid]).astype(mx.float32) for uid in uids]


def _says(reply: list[int]) -> Callable[[mx.array], mx.array]:
    """A sampler that takes the tokens of ``reply`` one after the other."""
    left = iter([*reply, 0])  # mlx-lm samples one token more than it hands out
    return lambda logprobs: mx.array([next(left)])
