"""The suites ``decode`` and ``prefill``: one attention call over a cache that is there."""

from __future__ import annotations

from contextlib import AbstractContextManager

import mlx.core as mx
from mlx_lm.models import base

import qsdpa_patch
from qsdpa_patch.bench.cases import Case, buffer_sets, quantized_rows, random_rows, stock_format
from qsdpa_patch.bench.chaining import chained
from qsdpa_patch.bench.measurement import DEQUANTIZED, OURS, TimedPath
from qsdpa_patch.kernels.dtypes import dtype_name
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor

__all__ = ["attention_paths"]

Packed = tuple[QuantizedTensor, QuantizedTensor]
Plain = tuple[mx.array, mx.array]


def attention_paths(case: Case, kernels: str) -> list[TimedPath]:
    """Ours, mlx-lm's quantized path, dequantize and fused SDPA, and fused SDPA over plain keys and values.

    To be called with the patch off: mlx-lm's function is taken as it is then. Several queries attend causally.
    """
    scale = case.key_dim**-0.5
    mask = "causal" if case.query_length > 1 else None
    queries = mx.random.normal((case.batch, case.heads, case.query_length, case.key_dim)).astype(case.dtype)
    mx.eval(queries)
    packed_bytes, packed = _packed_sets(case)
    plain_bytes, plain = _plain_sets(case)
    stock_sdpa = base.quantized_scaled_dot_product_attention

    def ours(x: mx.array, kv: Packed) -> mx.array:
        return qsdpa_patch.quantized_scaled_dot_product_attention(x, *kv, scale=scale, mask=mask)

    def stock(x: mx.array, kv: Packed) -> mx.array:
        keys, values = (tensor.parts for tensor in kv)
        out: mx.array = stock_sdpa(x, keys, values, scale=scale, mask=mask, **stock_format(case))
        return out

    def dequantized(x: mx.array, kv: Packed) -> mx.array:
        keys, values = (tensor.dequantize(case.dtype) for tensor in kv)
        return mx.fast.scaled_dot_product_attention(x, keys, values, scale=scale, mask=mask)

    def unquantized(x: mx.array, kv: Plain) -> mx.array:
        return mx.fast.scaled_dot_product_attention(x, *kv, scale=scale, mask=mask)

    def patch() -> AbstractContextManager[None]:
        return qsdpa_patch.enabled(kernels=kernels)

    packed_work, plain_work = case.work(packed_bytes), case.work(plain_bytes)
    return [
        TimedPath(OURS, chained(ours, queries, packed), packed_work, patch),
        TimedPath("mlx-lm quantized", chained(stock, queries, packed), packed_work),
        TimedPath(DEQUANTIZED, chained(dequantized, queries, packed), packed_work),
        TimedPath(f"SDPA, {dtype_name(case.dtype)} cache", chained(unquantized, queries, plain), plain_work),
    ]


def _packed_sets(case: Case) -> tuple[int, list[Packed]]:
    """The bytes of a pair of packed keys and values, and pairs to go round."""

    def make() -> Packed:
        return (
            quantized_rows(case.batch, case.kv_heads, case.context, case.key_dim, case.dtype, case.key_format),
            quantized_rows(case.batch, case.kv_heads, case.context, case.value_dim, case.dtype, case.value_format),
        )

    first = make()
    nbytes = sum(tensor.packed_nbytes for tensor in first)
    return nbytes, buffer_sets(make, nbytes)


def _plain_sets(case: Case) -> tuple[int, list[Plain]]:
    def make() -> Plain:
        return (
            random_rows(case.batch, case.kv_heads, case.context, case.key_dim, case.dtype),
            random_rows(case.batch, case.kv_heads, case.context, case.value_dim, case.dtype),
        )

    nbytes = case.batch * case.kv_heads * case.context * (case.key_dim + case.value_dim) * case.dtype.size
    return nbytes, buffer_sets(make, nbytes)
