"""Running a tiny model as ``generate_step`` does, and mlx-lm's own caches that hold rounded rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache

from qsdpa_patch.architectures.sizes import VOCABULARY
from qsdpa_patch.architectures.table import leaves
from qsdpa_patch.caches import QuantizedCache

CHUNKS = (29, 17, 5)
"""Lengths of the parts of the prompt: the first meets an unquantized cache, the others take the routes ``prefill`` and
``fused``. Together they cross every window, of 24 rows, as decoding does again."""
DECODED = 32
GROUP_SIZE = 64

_generate = import_module("mlx_lm.generate")  # mlx_lm has a function of that name


def prompt_and_reply(seed: int = 0) -> mx.array:
    """Tokens ``[1, N]``: the chunks of the prompt, then those that are fed one by one."""
    return mx.random.randint(0, VOCABULARY, (1, sum(CHUNKS) + DECODED), key=mx.random.key(seed))


@dataclass
class Run:
    """logits: ``[positions, vocabulary]`` float32, without those of the first chunk; caches: at the end."""

    logits: mx.array
    caches: list[Any]


def run(model: Any, tokens: mx.array, *, bits: int | None = None, twins: list[Any] | None = None) -> Run:
    """Feed ``tokens`` chunk by chunk, then one by one; quantize the cache after every step, as mlx-lm does.

    Args:
        bits: of the quantized cache; ``None`` for mlx-lm's own.
        twins: the caches of a quantized run; mlx-lm's own then hold rows rounded as those of their twins are.
    """
    caches = mlx_lm.models.cache.make_prompt_cache(model)
    logits = []
    for step, part in enumerate(_parts(tokens)):
        out = model(part, cache=caches)
        logits.append(out[0].astype(mx.float32))
        mx.eval(logits[-1])
        _generate.maybe_quantize_kv_cache(caches, 0, GROUP_SIZE, bits)
        if twins is not None and step == 0:
            for cache, twin in zip(leaves(caches), leaves(twins), strict=True):
                round_rows(cache, twin)
    return Run(mx.concatenate(logits[1:]), caches)


def _parts(tokens: mx.array) -> Iterator[mx.array]:
    start = 0
    for length in (*CHUNKS, *[1] * (tokens.shape[1] - sum(CHUNKS))):
        yield tokens[:, start : start + length]
        start += length


def round_rows(cache: Any, twin: Any) -> None:
    """Let ``cache`` hold the numbers that ``twin`` does: quantized and dequantized, what it has and what comes."""
    if not isinstance(twin, QuantizedCache):
        return
    bits = [None if side is None else side.bits for side in (twin.key_format, twin.value_format)]
    update = cache.update_and_fetch

    def update_and_fetch(keys: mx.array, values: mx.array) -> Any:
        return update(rounded(keys, bits[0]), rounded(values, bits[1]))

    cache.keys, cache.values = rounded(cache.keys, bits[0]), rounded(cache.values, bits[1])
    cache.update_and_fetch = update_and_fetch


def rounded(rows: mx.array, bits: int | None) -> mx.array:
    """``rows`` after affine quantization in groups of at most 64; odd ends are filled up with the last number."""
    dim = rows.shape[-1]
    if bits is None or dim == 0:
        return rows
    padding = -dim % 32
    group = GROUP_SIZE if (dim + padding) % GROUP_SIZE == 0 else 32
    padded = mx.concatenate([rows, *[rows[..., -1:]] * padding], axis=-1)
    codes, scales, biases = mx.quantize(padded, group, bits)
    return mx.dequantize(codes, scales, biases, group, bits)[..., :dim]
