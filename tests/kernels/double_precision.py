"""Attention in double precision, for kernels that may be nearer to the truth than a float32 reference is."""

from __future__ import annotations

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.reference import causal_mask

__all__ = ["attend_in_double"]


def attend_in_double(call: AttentionCall) -> mx.array:
    """``[B, Hq, L, Dv]`` float32: attention over the values that float32 dequantization gives, in float64."""
    with mx.stream(mx.cpu):
        out = _attend(call).astype(mx.float32)
        mx.eval(out)
    return out


def _attend(call: AttentionCall) -> mx.array:
    sig = call.signature
    group = sig.query_heads // sig.kv_heads
    keys, values = (
        mx.repeat(_double(tensor.dequantize(mx.float32, stored=True)), group, axis=1)
        for tensor in (call.keys, call.values)
    )
    scores = (_double(call.queries) * mx.array(call.scale, mx.float64)) @ keys.swapaxes(-1, -2)
    if call.rope is not None:
        scores = scores + _double(call.rope.queries) @ _double(call.rope.keys).swapaxes(-1, -2)
    never = mx.array(-mx.inf, mx.float64)
    if isinstance(call.mask, str):
        scores = mx.where(causal_mask(sig.query_length, call.key_count), scores, never)
    elif call.mask is not None:
        scores = mx.where(call.mask, scores, never) if call.mask.dtype == mx.bool_ else scores + _double(call.mask)
    if call.sinks is not None:
        sinks = mx.broadcast_to(_double(call.sinks)[:, None, None], (*scores.shape[:3], 1))
        scores = mx.concatenate([scores, sinks], axis=-1)
    peak = scores.max(axis=-1, keepdims=True)
    weights = mx.exp(scores - mx.where(peak == never, mx.zeros_like(peak), peak))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / mx.where(total == 0, mx.ones_like(total), total)
    return weights[..., : call.key_count] @ values


def _double(x: mx.array) -> mx.array:
    return x.astype(mx.float32).astype(mx.float64)
