"""The suite ``mla``: one step of absorbed multi-head latent attention, written as mlx-lm's models write it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

import qsdpa_patch
from qsdpa_patch.bench.cases import Case, buffer_sets, random_rows, stock_format
from qsdpa_patch.bench.chaining import chained
from qsdpa_patch.bench.measurement import DEQUANTIZED, OURS, TimedPath
from qsdpa_patch.kernels.dtypes import dtype_name

__all__ = ["latent_paths"]


def latent_paths(case: Case, kernels: str) -> list[TimedPath]:
    """The same step over our latent cache, mlx-lm's quantized cache, dequantized latents, and plain latents."""
    scale = (case.key_dim + case.rope_dim) ** -0.5
    shape = (case.batch, case.heads, case.query_length)
    queries = mx.random.normal((*shape, case.key_dim)).astype(case.dtype)
    rope_queries = mx.random.normal((*shape, case.rope_dim)).astype(case.dtype)
    mx.eval(queries, rope_queries)
    rope_bytes = case.rope_dim * case.dtype.size
    rows = case.batch * case.context
    packed_bytes = rows * (case.key_format.row_bytes(case.key_dim, case.dtype.size) + rope_bytes)
    plain_bytes = rows * (case.key_dim * case.dtype.size + rope_bytes)

    def step(x: mx.array, latents: Any, rope_keys: Any, cache: Any) -> mx.array:
        scores = (rope_queries * scale) @ rope_keys.swapaxes(-1, -2)
        # Looked up at each call, since the patch replaces it.
        out: mx.array = base.scaled_dot_product_attention(x, latents, latents, cache=cache, scale=scale, mask=scores)
        return out

    def over_cache(x: mx.array, cache: Any) -> mx.array:
        latents, rope_keys = cache.keys_and_values()
        return step(x, latents, rope_keys, cache)

    def dequantized(x: mx.array, cache: Any) -> mx.array:
        latents, rope_keys = cache.keys_and_values()
        return step(x, latents.dequantize(case.dtype), rope_keys[:], None)  # [:] makes a plain array of them

    def patch() -> AbstractContextManager[None]:
        return qsdpa_patch.enabled(kernels=kernels)

    def sets(make: Callable[[], Any], set_bytes: int) -> list[Any]:
        return buffer_sets(lambda: _filled(case, make()), set_bytes)

    packed = sets(lambda: qsdpa_patch.caches.QuantizedLatentCache(case.key_format), packed_bytes)
    plain = sets(mlx_lm_cache.KVCache, plain_bytes)
    stock: list[Any] = []  # filled when its turn comes, so that a failure is the path's own

    def prepare_stock() -> None:
        stock.append(_filled(case, mlx_lm_cache.QuantizedKVCache(**stock_format(case))))

    packed_work, plain_work = case.work(packed_bytes), case.work(plain_bytes)
    return [
        TimedPath(OURS, chained(over_cache, queries, packed), packed_work, patch),
        TimedPath("mlx-lm quantized", chained(over_cache, queries, stock), packed_work, prepare=prepare_stock),
        TimedPath(DEQUANTIZED, chained(dequantized, queries, packed), packed_work),
        TimedPath(f"SDPA, {dtype_name(case.dtype)} cache", chained(over_cache, queries, plain), plain_work),
    ]


def _filled(case: Case, cache: Any) -> Any:
    """``cache`` with ``case.context`` latents and rotary keys put in."""
    latents = random_rows(case.batch, 1, case.context, case.key_dim, case.dtype, spare=0)
    rope_keys = random_rows(case.batch, 1, case.context, case.rope_dim, case.dtype, spare=0)
    cache.update_and_fetch(latents, rope_keys)
    mx.eval(cache.state)
    return cache
