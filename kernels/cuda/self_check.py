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
from qsdpa_patch.kernels.cuda.source import stores_new_rows
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.messages import first_error
from qsdpa_patch.kernels.pending_rows import PendingRows
from qsdpa_patch.kernels.quantized_tensor import PackedStack, QuantizedTensor, quantize_parts, stack_alike
from qsdpa_patch.kernels.row_quantization import quantize_rows_in_ops

__all__ = ["failure"]

_log = logging.getLogger("qsdpa_patch")
_failures: dict[str, str] = {}
_TOLERANCE = {mx.float16: 4e-3, mx.bfloat16: 2e-2, mx.float32: 1e-4}


def failure(kernel: DecodeKernel | MlaKernel | PrefillKernel) -> str:
    """Why ``kernel`` cannot be used on this device, in a line; empty if it can.

    Found out once a compiled kernel, and logged with all that the compiler said.
    """
    if kernel.source not in _failures:
        problem, message = _problem(kernel)
        if problem:
            _log.warning("qsdpa_patch: %s%s (%s)", problem, message, kernel.plan.signature)
        _failures[kernel.source] = problem + first_error(message)
    return _failures[kernel.source]


def _problem(kernel: DecodeKernel | MlaKernel | PrefillKernel) -> tuple[str, str]:
    """What is wrong with ``kernel``, and the message of what it raised."""
    sig = kernel.plan.signature
    try:
        call = _sample_call(sig, kernel.plan.keys_to_check)
        actual = kernel(call)
        mx.eval(actual)
        with mx.stream(mx.cpu):  # on the GPU, MLX multiplies float32 matrices in TF32
            error = _relative_error(actual, reference.attend(call))
        stores = not isinstance(kernel, DecodeKernel) or _stores_new_rows(kernel, call)
    except RuntimeError as exception:
        return "the kernel failed on this device: ", str(exception)
    if not error <= _TOLERANCE[sig.dtype]:  # or not a number
        return f"the kernel is wrong on this device: error {error:.2g} in its self-check", ""
    return "" if stores else "the kernel stores new rows wrongly on this device", ""


def _stores_new_rows(kernel: DecodeKernel, call: AttentionCall) -> bool:
    """Whether ``kernel``, where it can store new rows, stores the bits that MLX would, and attends to them."""
    sig, stack = call.signature, call.stack
    if stack is None or not stores_new_rows(sig):
        return True
    sides = [_normal(sig.batch, sig.kv_heads, sig.query_length, sig.key_dim).astype(sig.dtype) + i for i in range(2)]
    new = quantize_rows_in_ops(sides, sig.key_format)
    kept = [x[:, :, : stack.rows - sig.query_length] for x in stack.buffers]
    stored = [mx.concatenate([x, y], axis=2) for x, y in zip(kept, new)]
    buffers = [mx.concatenate([x, mx.zeros_like(y), y], axis=2) for x, y in zip(kept, new)]
    mx.eval(stored, buffers)

    def attend(arrays: list[mx.array], pending: PendingRows | None) -> mx.array:
        members = PackedStack(
            arrays[0], arrays[1], 2, sig.key_format,
            dim=sig.key_dim, dtype=sig.dtype, rows=stack.rows, pending=pending,
        ).members()  # fmt: skip
        return kernel(check_call(call.queries, *members, scale=call.scale, mask=call.mask, sinks=call.sinks))

    pending = PendingRows(sides, _never, buffers, stack.rows, None)
    same = [mx.array_equal(attend(buffers, pending), attend(stored, None))]
    after = [x[:, :, : stack.rows] for x in pending.then(buffers)]
    same += [mx.array_equal(x.view(mx.uint8), y.view(mx.uint8)) for x, y in zip(after, stored)]
    return all(x.item() for x in same)


def _never(*_: object) -> mx.array:
    raise RuntimeError("the kernel left new rows to another one")


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
