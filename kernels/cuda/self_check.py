"""A check of each kernel at its first use: it must compile on this device and agree with the reference."""

from __future__ import annotations

import logging
from typing import cast

import mlx.core as mx

from qsdpa_patch.kernels import reference
from qsdpa_patch.kernels.attention_call import AttentionCall, RopeTerm, Signature, check_call
from qsdpa_patch.kernels.cuda.decode import DecodeKernel
from qsdpa_patch.kernels.cuda.mla import MlaKernel
from qsdpa_patch.kernels.cuda.prefill import PrefillKernel
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, quantize_parts, stack_alike

__all__ = ["failure"]

_log = logging.getLogger("qsdpa_patch")
_failures: dict[str, str] = {}
_TOLERANCE = {mx.float16: 4e-3, mx.bfloat16: 2e-2, mx.float32: 1e-4}


def failure(kernel: DecodeKernel | MlaKernel | PrefillKernel) -> str:
    """Why ``kernel`` cannot be used on this device; empty if it can. Found out, and logged, once a compiled kernel."""
    if kernel.source not in _failures:
        _failures[kernel.source] = problem = _problem(kernel)
        if problem:
            _log.warning("qsdpa_patch: %s (%s)", problem, kernel.plan.signature)
    return _failures[kernel.source]


def _problem(kernel: DecodeKernel | MlaKernel | PrefillKernel) -> str:
    sig = kernel.plan.signature
    try:
        call = _sample_call(sig, kernel.plan.keys_to_check)
        actual = kernel(call)
        mx.eval(actual)
        with mx.stream(mx.cpu):  # on the GPU, MLX multiplies float32 matrices in TF32
            error = _relative_error(actual, reference.attend(call))
    except RuntimeError as exception:
        return f"the kernel failed on this device: {exception}"
    if error <= _TOLERANCE[sig.dtype]:
        return ""
    return f"the kernel is wrong on this device: error {error:.2g} in its self-check"


def _sample_call(sig: Signature, count: int) -> AttentionCall:
    """A call of ``sig`` with ``count`` keys and random operands."""
    count = max(count, sig.query_length)
    keys, values = _random_tensors(sig, count)
    queries = _normal(sig.batch, sig.query_heads, sig.query_length, sig.key_dim).astype(sig.dtype)
    mask: mx.array | str | None = None
    if sig.mask == "causal":
        mask = "causal"
    elif sig.mask != "none":
        keep = _normal(1, 1, sig.query_length, count) < 1
        mask = keep if sig.mask == "bool" else mx.where(keep, 0, -mx.inf).astype(sig.dtype)
    rope = None
    if sig.rope_dim:
        rope_queries = 0.1 * _normal(sig.batch, sig.query_heads, sig.query_length, sig.rope_dim)
        rope_keys = _normal(sig.batch, 1, count, sig.rope_dim)
        rope = RopeTerm(rope_queries.astype(sig.dtype), rope_keys.astype(sig.dtype))
    sinks = _normal(sig.query_heads).astype(sig.dtype) if sig.has_sinks else None
    return check_call(queries, keys, values, scale=sig.key_dim**-0.5, mask=mask, sinks=sinks, rope=rope)


def _random_tensors(sig: Signature, count: int) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Keys and values: of one stack, as in a cache, where they are alike."""
    keys = _random_tensor(sig, sig.key_dim, sig.key_format, sig.key_scale_dtype, count)
    if sig.shared_kv:
        return keys, keys
    values = _random_tensor(sig, sig.value_dim, sig.value_format, sig.value_scale_dtype, count)
    return stack_alike(keys, values) or (keys, values)


def _random_tensor(sig: Signature, dim: int, format: Format, scale_dtype: mx.Dtype, count: int) -> QuantizedTensor:
    x = _normal(sig.batch, sig.kv_heads, count, dim)
    codes, scales, *biases = quantize_parts(x.astype(scale_dtype) if format.is_affine else x, format)
    return QuantizedTensor(codes, scales, biases[0] if biases else None, format, dtype=sig.dtype)


def _normal(*shape: int) -> mx.array:
    """Random numbers that leave the state of ``mx.random`` alone."""
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


def _relative_error(actual: mx.array, wanted: mx.array) -> float:
    actual, wanted = actual.astype(mx.float32), wanted.astype(mx.float32)
    error, peak = mx.abs(actual - wanted).max(), mx.abs(wanted).max()
    return cast(float, (error / mx.maximum(peak, 1e-6)).item())
