"""Attention in ops over tiles of keys and queries, with a running softmax: nothing of the size of the scores is kept.

The online softmax of FlashAttention (Dao et al., 2022; Milakov and Gimelshein, 2018), written in MLX ops. It takes
every call, so it is the route of last resort (``ops``), and it serves many query rows where MLX has no fused SDPA
(:mod:`~qsdpa_patch.kernels.dequantized_sdpa`).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.evaluation import evaluate_unless_traced
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor
from qsdpa_patch.kernels.slices import Block, blocks, slice_heads, slice_mask, slice_rows

__all__ = ["attend"]

_KEY_TILE = 2048
_FLOAT_BYTES = 4
_LIVE_SCORE_COPIES = 4  # of one tile's scores while it is worked on: product, masked, exponentials, one in flight
_LIVE_ROW_COPIES = 6  # of one dequantized row: MLX's CPU build unpacks it in several ops


@dataclass(frozen=True)
class _Tiles:
    """Sizes of a step: ``heads`` key heads of one sequence, ``keys`` keys, ``queries`` query positions.

    ``fits``: whether all steps together stay within the budget, so that nothing needs evaluating between them.
    """

    heads: int
    keys: int
    queries: int
    fits: bool


def attend(call: AttentionCall, budget: int) -> mx.array:
    """Attention ``[B, Hq, L, Dv]`` of ``call`` in the queries' dtype; products, scores and softmax in float32.

    Args:
        call: any checked call.
        budget: bytes that the transient may take, about. Work that does not fit is cut, and each piece is evaluated
            before the next, except under a function transformation, where nothing can be evaluated.
    """
    sig = call.signature
    tiles = _plan(call, budget)
    outputs = [_attend_block(call, block, tiles) for block in blocks(sig, tiles.heads)]
    rows = [mx.concatenate(outputs[i : i + len(outputs) // sig.batch], axis=1)
            for i in range(0, len(outputs), len(outputs) // sig.batch)]  # fmt: skip
    return rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=0)


def _plan(call: AttentionCall, budget: int) -> _Tiles:
    """As many keys, then query rows, then heads at a time as the budget holds."""
    sig = call.signature
    group = sig.query_heads // sig.kv_heads
    row = (sig.key_dim + sig.value_dim) * _FLOAT_BYTES * _LIVE_ROW_COPIES
    score = group * _FLOAT_BYTES * _LIVE_SCORE_COPIES

    def cost(keys: int, queries: int) -> int:  # of one head
        return keys * (row + score * queries)

    keys, queries = max(call.key_count, 1), sig.query_length
    fits = sig.batch * sig.kv_heads * cost(keys, queries) <= budget
    if cost(keys, queries) > budget:
        keys = min(keys, _KEY_TILE)
        queries = min(queries, max(1, (budget // keys - row) // score))
    heads = max(1, min(sig.kv_heads, budget // cost(keys, queries)))
    return _Tiles(heads, keys, queries, fits)


def _attend_block(call: AttentionCall, block: Block, tiles: _Tiles) -> mx.array:
    """The heads of ``block``: ``[1, heads * group, L, Dv]``."""
    sig = call.signature
    keys = slice_heads(call.keys, block)
    values = keys if sig.shared_kv else slice_heads(call.values, block)
    outputs = []
    for start in range(0, sig.query_length, tiles.queries):
        stop = min(start + tiles.queries, sig.query_length)
        out = _attend_rows(call, keys, values, block, start, stop, tiles)
        if not tiles.fits:
            evaluate_unless_traced(out)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _attend_rows(
    call: AttentionCall,
    keys: QuantizedTensor,
    values: QuantizedTensor,
    block: Block,
    start: int,
    stop: int,
    tiles: _Tiles,
) -> mx.array:
    """Query rows ``start`` to ``stop`` of the heads of ``block``, over all keys, tile by tile."""
    sig, count = call.signature, call.key_count
    heads, rows = block.heads, stop - start
    group = sig.query_heads // sig.kv_heads
    queries = call.queries[block.batch, block.query_heads(group), start:stop].astype(mx.float32) * call.scale
    queries = queries.reshape(heads, group * rows, sig.key_dim)
    peak = mx.full((heads, group * rows, 1), -mx.inf)
    total = mx.zeros((heads, group * rows, 1))
    out = mx.zeros((heads, group * rows, sig.value_dim))
    visible = count - (sig.query_length - stop) if sig.mask == "causal" else count
    for first in range(0, visible, tiles.keys):
        last = min(first + tiles.keys, visible)
        key_tensor = slice_rows(keys, first, last)
        key_values = key_tensor.dequantize(mx.float32, stored=True)[0]
        scores = queries @ key_values.swapaxes(-1, -2)
        scores = _add_terms(call, block, scores.reshape(heads * group, rows, last - first), start, stop, first, last)
        scores = scores.reshape(heads, group * rows, last - first)
        value_values = (
            key_values if sig.shared_kv else slice_rows(values, first, last).dequantize(mx.float32, stored=True)[0]
        )
        new_peak = mx.maximum(peak, scores.max(axis=-1, keepdims=True))
        shift = mx.where(new_peak == -mx.inf, 0, new_peak)
        weights = mx.exp(scores - shift)
        decay = mx.exp(peak - shift)
        total = total * decay + weights.sum(axis=-1, keepdims=True)
        out = out * decay + weights @ value_values
        peak = new_peak
        if not tiles.fits:
            evaluate_unless_traced(peak, total, out)
    if call.sinks is not None:
        sinks = call.sinks[block.query_heads(group)].astype(mx.float32)
        sinks = mx.repeat(sinks.reshape(heads, group), rows, axis=1)[..., None]
        new_peak = mx.maximum(peak, sinks)
        decay = mx.exp(peak - new_peak)
        total, out = total * decay + mx.exp(sinks - new_peak), out * decay
    out = out / mx.where(total == 0, 1, total)
    return out.reshape(1, heads * group, rows, sig.value_dim).astype(sig.dtype)


def _add_terms(
    call: AttentionCall, block: Block, scores: mx.array, start: int, stop: int, first: int, last: int
) -> mx.array:
    """``scores`` ``[query heads, rows, keys]`` of a tile, with its part of the rope term and the mask."""
    group = call.signature.query_heads // call.signature.kv_heads
    if call.rope is not None:
        rope_queries = call.rope.queries[block.batch, block.query_heads(group), start:stop].astype(mx.float32)
        rope_keys = call.rope.keys[block.batch, :, first:last].astype(mx.float32)
        scores = scores + rope_queries @ rope_keys.swapaxes(-1, -2)
    if call.mask is None:
        return scores
    if isinstance(call.mask, str):
        positions = mx.arange(start, stop)[:, None] + (call.key_count - call.signature.query_length)
        return mx.where(positions >= mx.arange(first, last), scores, -mx.inf)
    mask = slice_mask(call.mask, block, group)[0, :, slice(None) if call.mask.shape[2] == 1 else slice(start, stop)]
    mask = mask if mask.shape[-1] == 1 else mask[..., first:last]
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, -mx.inf)
    return scores + mask.astype(mx.float32)
