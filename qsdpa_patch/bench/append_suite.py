"""The suite ``append``: what it costs to add a token to a cache, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

import qsdpa_patch
from qsdpa_patch.bench.cases import Case, random_rows, stock_format
from qsdpa_patch.bench.chaining import SUBMITTED_TOGETHER, submit
from qsdpa_patch.bench.measurement import OURS, TimedPath
from qsdpa_patch.callers import TAKES_STACK_MEMBERS
from qsdpa_patch.kernels.dtypes import dtype_name

__all__ = ["append_paths"]


def append_paths(case: Case) -> list[TimedPath]:
    """Our cache, mlx-lm's quantized one and its plain one.

    The same rows are written again and again: a cache is cut back after each run, and never grows while timed.
    """
    return [
        _path(OURS, case, lambda: qsdpa_patch.caches.QuantizedKVCache(case.key_format, case.value_format)),
        _path("mlx-lm quantized", case, lambda: mlx_lm_cache.QuantizedKVCache(**stock_format(case))),
        _path(f"{dtype_name(case.dtype)} cache", case, mlx_lm_cache.KVCache),
    ]


def _path(name: str, case: Case, make: Callable[[], Any]) -> TimedPath:
    filled: list[Any] = []
    keys, values = _rows(case, case.query_length)

    def prepare() -> None:
        cache = make()
        cache.update_and_fetch(*_rows(case, case.context))
        cache.update_and_fetch(keys, values)  # grows, where the context fills the buffers
        mx.eval(cache.state)
        cache.trim(case.query_length)
        filled.append(cache)

    def run(calls: int) -> Any:
        (cache,) = filled
        for number in range(calls):
            if number % SUBMITTED_TOGETHER == SUBMITTED_TOGETHER - 1:
                submit(cache.state)
            _store(cache, keys, values)
        written = cache.state
        cache.trim(calls * case.query_length)
        return written

    return TimedPath(name, run, prepare=prepare)


def _nothing(keys: Any, values: Any) -> None:
    """In the place of attention: a cache does less for functions that only attend to what it gives them."""


setattr(_nothing, TAKES_STACK_MEMBERS, _nothing)
scaled_dot_product_attention = _nothing


def _store(cache: Any, keys: mx.array, values: mx.array) -> None:
    """Store new rows as the layer of a model does."""
    keys, values = cache.update_and_fetch(keys, values)
    scaled_dot_product_attention(keys, values)


def _rows(case: Case, count: int) -> tuple[mx.array, mx.array]:
    return (
        random_rows(case.batch, case.kv_heads, count, case.key_dim, case.dtype, spare=0),
        random_rows(case.batch, case.kv_heads, count, case.value_dim, case.dtype, spare=0),
    )
