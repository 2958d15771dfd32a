"""One process of a distributed run: ``python -m tests.distributed.worker ARCHITECTURE MODE BITS``.

MODE is ``tensor``, ``pipeline`` or ``single``. It prints the generated tokens and the report as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache

import qsdpa_patch
from qsdpa_patch.architectures.tiny_models import build

PROMPT = [3 + (5 * i) % 50 for i in range(45)]
TOKENS = 20


def sharded(architecture: str, mode: str) -> Any:
    """The model of ``architecture`` with this process's part of it."""
    model = build(architecture)
    mx.eval(model.parameters())
    if mode == "tensor":
        model.shard(mx.distributed.init())
    elif mode == "pipeline":
        model.model.pipeline(mx.distributed.init())
    return model


def main(architecture: str, mode: str, bits: str) -> None:
    model = sharded(architecture, mode)
    cache = make_prompt_cache(model)
    with qsdpa_patch.enabled():
        steps = generate_step(
            mx.array(PROMPT), model, max_tokens=TOKENS, prompt_cache=cache, kv_bits=int(bits), quantized_kv_start=0,
            prefill_step_size=20,
        )  # fmt: skip
        tokens = [int(token) for token, _ in islice(steps, TOKENS)]
        mx.synchronize(generation_stream)  # it has begun another step, for which the other process needs this one
    rank = mx.distributed.init().rank()
    result = {"rank": rank, "tokens": tokens, "caches": sorted({type(layer).__qualname__ for layer in cache}),
              "calls": qsdpa_patch.report().calls}  # fmt: skip
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
