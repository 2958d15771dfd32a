"""A call of the C library: its fields in memory, in the order of the C structure ``call``.

What follows from the signature alone is laid out once; each call fills in the rest.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall, Signature
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import PackedStack

__all__ = ["VIEW_COUNT", "CallFields", "arrays_of", "arrays_of_stack", "fill_fields"]

VIEW_COUNT = 12
_VIEWS = VIEW_COUNT * 5  # an address and four strides each
_VARYING = 5
_STATIC = 2 * 6 + 8

CallFields = ctypes.c_int64 * (_VIEWS + _VARYING + _STATIC)
"""The C structure ``call``; the views come first."""

# The enumerations of the C sources.
_TYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2, mx.bool_: -1}
_SCALE_TYPES = {"mxfp4": 3, "mxfp8": 3, "nvfp4": 4}
_KINDS = {"affine": 0, "mxfp4": 1, "nvfp4": 1, "mxfp8": 2}
_MASKS = {"none": 0, "causal": 1, "bool": 2, "additive": 3}


def arrays_of(call: AttentionCall) -> list[mx.array | None]:
    """The arrays of ``call`` in the order of the C structure's views, the output (the second) left out."""
    keys, values = call.keys, call.values
    parts = [keys.codes, keys.scales, keys.biases, values.codes, values.scales, values.biases]
    return [*_unquantized_arrays_of(call), *parts]


def arrays_of_stack(call: AttentionCall, stack: PackedStack) -> list[mx.array | None]:
    """Likewise, with the two arrays of ``stack``, of keys and values, in place of the keys' codes and scales alone.

    The kernel is told how many rows there are, so it takes whole buffers: slices would be two more operations a call.
    """
    codes, scales = stack.buffers if stack.pending is None else (stack.codes, stack.scales)
    return [*_unquantized_arrays_of(call), codes, scales, None, None, None, None]


def _unquantized_arrays_of(call: AttentionCall) -> tuple[mx.array | None, ...]:
    rope = call.rope
    return (
        call.queries,
        None,
        call.mask if isinstance(call.mask, mx.array) else None,
        call.sinks,
        None if rope is None else rope.queries,
        None if rope is None else rope.keys,
    )


def fill_fields(call: AttentionCall, threads: int) -> ctypes.Array[ctypes.c_int64]:
    """The fields of ``call``, all but the views.

    Raises:
        KeyError: a rope term of a dtype that is not taken.
    """
    fields = CallFields.from_buffer_copy(_layout(call.signature, threads))
    fields[_VIEWS] = call.key_count
    if isinstance(call.mask, mx.array):
        fields[_VIEWS + 1] = _TYPES[call.mask.dtype]
    if call.sinks is not None:
        fields[_VIEWS + 2] = _TYPES[call.sinks.dtype]
    if call.rope is not None:
        fields[_VIEWS + 3] = _TYPES[call.rope.queries.dtype]
        fields[_VIEWS + 4] = _TYPES[call.rope.keys.dtype]
    return fields


@lru_cache(maxsize=4096)
def _layout(signature: Signature, threads: int) -> ctypes.Array[ctypes.c_int64]:
    sig = signature
    static = (
        *_format_fields(sig.key_format, sig.key_scale_dtype, sig.key_dim),
        *_format_fields(sig.value_format, sig.value_scale_dtype, sig.value_dim),
        sig.batch,
        sig.query_heads,
        sig.kv_heads,
        sig.query_length,
        _TYPES[sig.dtype],
        _MASKS[sig.mask],
        sig.rope_dim,
        threads,
    )
    return CallFields(*(0,) * (_VIEWS + _VARYING), *static)


def _format_fields(format: Format, scale_dtype: mx.Dtype, dim: int) -> tuple[int, ...]:
    scale_type = _TYPES[scale_dtype] if format.is_affine else _SCALE_TYPES[format.mode]
    return _KINDS[format.mode], format.bits, format.group_size, int(format.symmetric), scale_type, dim
