"""Attention of many query rows: a few key heads at a time are dequantized into MLX's own fused SDPA.

Only where that kernel exists for the shape (:func:`has_fused_sdpa`): elsewhere MLX would write the scores out.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall, Signature
from qsdpa_patch.kernels.evaluation import evaluate_unless_traced
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor
from qsdpa_patch.kernels.slices import Block, blocks, slice_heads, slice_mask

__all__ = ["attend", "has_fused_sdpa"]


def has_fused_sdpa(signature: Signature) -> tuple[bool, str]:
    """Whether MLX has a fused SDPA on the default device for calls of ``signature``, and if not, its own reason."""
    return _probe(signature._replace(batch=1, has_sinks=False), mx.default_device().type)


@cache
def _probe(sig: Signature, device: mx.DeviceType) -> tuple[bool, str]:
    """Ask MLX by building, not evaluating, a small call of the same kind with ``force_fused``."""
    group = sig.query_heads // sig.kv_heads
    count = max(sig.query_length, 16)
    queries = mx.zeros((1, group, sig.query_length, sig.key_dim), sig.dtype)
    keys = mx.zeros((1, 1, count, sig.key_dim), sig.dtype)
    values = mx.zeros((1, 1, count, sig.value_dim), sig.dtype)
    mask: mx.array | str | None = None if sig.mask == "none" else "causal"
    if sig.mask in ("bool", "additive"):
        mask = mx.zeros((1, 1, sig.query_length, count), mx.bool_ if sig.mask == "bool" else sig.dtype)
    try:
        mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask, force_fused=True)
    except (ValueError, TypeError, RuntimeError) as error:
        return False, str(error)
    return True, ""


def attend(call: AttentionCall, budget: int) -> mx.array:
    """Attention ``[B, Hq, L, Dv]`` of ``call`` in the queries' dtype.

    Args:
        call: one without a rope term, for which :func:`has_fused_sdpa` says yes.
        budget: bytes that the dequantized keys and values may take at a time, one key head at the least. What does
            not fit is cut into blocks of heads, each evaluated before the next.
    """
    sig = call.signature
    head_bytes = call.key_count * (sig.key_dim + sig.value_dim) * sig.dtype.size
    heads = max(1, min(sig.kv_heads, budget // max(head_bytes, 1)))
    if heads == sig.kv_heads and head_bytes * heads * sig.batch <= budget:
        return _zero_masked_rows(call, _sdpa(call, call.keys, call.values, None))
    outputs = []
    for block in blocks(sig, heads):
        out = _sdpa(call, slice_heads(call.keys, block), slice_heads(call.values, block), block)
        evaluate_unless_traced(out)
        outputs.append(out)
    per_sequence = len(outputs) // sig.batch
    rows = [mx.concatenate(outputs[i : i + per_sequence], axis=1) for i in range(0, len(outputs), per_sequence)]
    return _zero_masked_rows(call, mx.concatenate(rows, axis=0))


def _sdpa(call: AttentionCall, keys: QuantizedTensor, values: QuantizedTensor, block: Block | None) -> mx.array:
    sig = call.signature
    queries, mask, sinks = call.queries, call.mask, call.sinks
    if block is not None:
        group = sig.query_heads // sig.kv_heads
        queries = queries[block.batch, block.query_heads(group)]
        mask = slice_mask(mask, block, group) if isinstance(mask, mx.array) else mask
        sinks = None if sinks is None else sinks[block.query_heads(group)]
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(sig.dtype)
    return mx.fast.scaled_dot_product_attention(
        queries,
        keys.dequantize(sig.dtype, stored=True),
        values.dequantize(sig.dtype, stored=True),
        scale=call.scale,
        mask=mask,
        sinks=None if sinks is None else sinks.astype(sig.dtype),
        force_fused=True,
    )


def _zero_masked_rows(call: AttentionCall, out: mx.array) -> mx.array:
    """Zeros where a mask leaves a row no key: MLX's kernels give NaN, or the mean of the values."""
    if not isinstance(call.mask, mx.array):
        return out
    mask = call.mask if call.mask.dtype == mx.bool_ else call.mask != -mx.inf
    return mx.where(mask.any(axis=-1, keepdims=True), out, mx.zeros((), out.dtype))
