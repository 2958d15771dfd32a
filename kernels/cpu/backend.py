"""The CPU backend: one C library, compiled for the host at first use, called on evaluated buffers in place."""

from __future__ import annotations

import os
import struct
from functools import cache

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall, Signature
from qsdpa_patch.kernels.backends import Declined
from qsdpa_patch.kernels.cpu.buffers import NO_VIEW, strided_view
from qsdpa_patch.kernels.cpu.compiler import CompilerError, find_compiler
from qsdpa_patch.kernels.cpu.library import load_library
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor

__all__ = ["attend", "has_fused_kernel", "is_available"]

# The enumerations of the C sources.
_TYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}
_SCALE_TYPES = {"mxfp4": 3, "mxfp8": 3, "nvfp4": 4}
_KINDS = {"affine": 0, "mxfp4": 1, "nvfp4": 1, "mxfp8": 2}
_MASKS = {"none": 0, "causal": 1, "bool": 2, "additive": 3}
_CALL = struct.Struct("72q")


@cache
def is_available() -> tuple[bool, str]:
    """Whether this machine can run the kernels, and if not, why. Compiles nothing."""
    if os.name != "posix":
        return False, f"the CPU kernels need POSIX threads; this is {os.name}"
    try:
        find_compiler()
    except CompilerError as error:
        return False, str(error)
    return True, ""


@cache
def has_fused_kernel(signature: Signature) -> tuple[bool, str]:
    """Whether calls of ``signature`` can be taken, and if not, why. The first use compiles the library."""
    available, reason = is_available()
    if not available:
        return False, reason
    for name, dim in (("key", signature.key_dim), ("value", signature.value_dim)):
        if dim % 32 or not 32 <= dim <= 512:
            return False, f"{name} rows of {dim} numbers: the kernel takes multiples of 32 from 32 to 512"
    try:
        load_library()
    except CompilerError as error:
        return False, str(error)
    return True, ""


@cache
def thread_count() -> int:
    """Threads of a call: ``$QSDPA_CPU_THREADS``, or the cores that this process may use."""
    chosen = os.environ.get("QSDPA_CPU_THREADS", "")
    if chosen:
        if not chosen.isdigit() or int(chosen) < 1:
            raise ValueError(f"QSDPA_CPU_THREADS={chosen!r}: give a number of threads, 1 or more")
        return int(chosen)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def attend(call: AttentionCall) -> mx.array:
    """Attention ``[B, Hq, L, Dv]`` of ``call`` in the queries' dtype, evaluated.

    Raises:
        Declined: the inputs cannot be evaluated, or gradients are wanted of them.
    """
    sig = call.signature
    out = mx.zeros((sig.batch, sig.query_heads, sig.query_length, sig.value_dim), sig.dtype)
    mask = call.mask if isinstance(call.mask, mx.array) else None
    rope = call.rope
    inputs = [call.queries, *call.keys.parts]
    if not sig.shared_kv:
        inputs += call.values.parts
    if mask is not None:
        inputs.append(mask)
    if call.sinks is not None:
        inputs.append(call.sinks)
    if rope is not None:
        inputs += (rope.queries, rope.keys)
    try:
        mx.eval(out, *inputs)
    except ValueError as error:
        raise Declined(str(error)) from error
    keys = _packed_fields(call.keys)
    fields = _CALL.pack(
        *strided_view(call.queries)[:4],
        *strided_view(out)[:4],
        *((0, 0, 0, 0, 0) if mask is None else strided_view(mask)),
        *((0, 0) if call.sinks is None else strided_view(call.sinks)),
        *(NO_VIEW if rope is None else strided_view(rope.queries)[:4]),
        *(NO_VIEW if rope is None else strided_view(rope.keys)[:4]),
        *keys,
        *(keys if sig.shared_kv else _packed_fields(call.values)),
        sig.batch,
        sig.query_heads,
        sig.kv_heads,
        sig.query_length,
        call.key_count,
        _TYPES[sig.dtype],
        _MASKS[sig.mask],
        0 if mask is None else _TYPES.get(mask.dtype, 0),
        0 if call.sinks is None else _TYPES[call.sinks.dtype],
        sig.rope_dim,
        0 if rope is None else _TYPES[rope.queries.dtype],
        0 if rope is None else _TYPES[rope.keys.dtype],
        thread_count(),
    )
    if load_library().functions.qsdpa_attend(fields, call.scale):
        raise Declined("not enough memory for the CPU kernel")
    return out


def _packed_fields(tensor: QuantizedTensor) -> tuple[int, ...]:
    format: Format = tensor.format
    return (
        *strided_view(tensor.codes)[:4],
        *strided_view(tensor.scales)[:4],
        *(NO_VIEW if tensor.biases is None else strided_view(tensor.biases)[:4]),
        _KINDS[format.mode],
        format.bits,
        format.group_size,
        int(format.symmetric),
        _TYPES[tensor.scales.dtype] if format.is_affine else _SCALE_TYPES[format.mode],
        tensor.padded_dim,
    )
