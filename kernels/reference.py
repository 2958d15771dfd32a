"""Attention over quantized keys and values in plain MLX ops: the definition that every kernel is held against.

It is also the route of last resort (``ops``): right for every call, on every device, under every transformation.
"""

from __future__ import annotations

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall

__all__ = ["attend"]


def attend(call: AttentionCall) -> mx.array:
    """Attention ``[B, Hq, L, Dv]`` of ``call`` (rows of the stored length) in the queries' dtype.

    Everything runs in float32: 16-bit products miss the accuracy asked of a kernel when a channel of the keys is much
    larger than the others.
    """
    sig = call.signature
    dtype = mx.float32
    groups = sig.query_heads // sig.kv_heads
    grouped = (sig.batch, sig.kv_heads, groups * sig.query_length)
    queries = (call.queries.astype(dtype) * call.scale).reshape(*grouped, sig.key_dim)
    keys = call.keys.dequantize(dtype, stored=True)
    values = keys if sig.shared_kv else call.values.dequantize(dtype, stored=True)
    full = (sig.batch, sig.query_heads, sig.query_length, call.key_count)
    scores = (queries @ keys.swapaxes(-1, -2)).astype(mx.float32).reshape(full)
    if call.rope is not None:
        rope_keys = call.rope.keys.astype(dtype).swapaxes(-1, -2)
        scores = scores + (call.rope.queries.astype(dtype) @ rope_keys).astype(mx.float32)
    weights = _softmax(_masked(scores, call.mask), call.sinks).astype(dtype)
    out = weights.reshape(*grouped, call.key_count) @ values
    return out.reshape(*full[:3], sig.value_dim).astype(sig.dtype)


def causal_mask(length: int, count: int) -> mx.array:
    """Boolean ``[length, count]``: the last query sees every key, each earlier one a key fewer."""
    return mx.arange(count - length, count)[:, None] >= mx.arange(count)[None]


def _masked(scores: mx.array, mask: mx.array | str | None) -> mx.array:
    if mask is None:
        return scores
    if isinstance(mask, str):
        mask = causal_mask(*scores.shape[-2:])
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, -mx.inf)
    return scores + mask.astype(mx.float32)


def _softmax(scores: mx.array, sinks: mx.array | None) -> mx.array:
    """Softmax over the last axis, with ``sinks`` in the denominator; a row of ``-inf`` alone gives zeros."""
    peak = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(mx.float32)[:, None, None]
        peak = mx.maximum(peak, sinks)
    peak = mx.where(peak == -mx.inf, 0, peak)
    weights = mx.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + mx.exp(sinks - peak)
    return weights / mx.where(total == 0, 1, total)
