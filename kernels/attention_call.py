"""One attention call over quantized keys and values: its checked arguments, and its static description.

Everything behind this module (plans, kernels, the reference) may rely on what :func:`check_call` has checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx

from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import PackedStack, QuantizedTensor, StackMember
from qsdpa_patch.kernels.rotation import rotate

__all__ = ["AttentionCall", "RopeTerm", "Signature", "check_call"]

_TENSORS = (QuantizedTensor, StackMember)
_FLOATS = (mx.float16, mx.bfloat16, mx.float32)


@dataclass(slots=True)  # not frozen, which takes three times as long to make
class RopeTerm:
    """The second score term of absorbed MLA: ``queries @ keys^T`` is added to the scaled scores.

    queries: ``[B, Hq, L, R]``, already multiplied by the softmax scale.
    keys: ``[B, 1, N, R]``, plain (not quantized), possibly a slice of a larger buffer.
    """

    queries: mx.array
    keys: mx.array


class Signature(NamedTuple):
    """What a kernel may be specialized on: all that is static about a call, without the number of keys.

    The calls of :func:`check_call` that have equal signatures have the very same, so that it can be known by identity.

    key_dim and value_dim are stored row lengths, multiples of 32.
    dtype and scale dtypes are :class:`mlx.core.Dtype`; a scale dtype is uint8 for floating-point formats.
    mask is ``"none"``, ``"causal"``, ``"bool"`` or ``"additive"``.
    """

    batch: int
    query_heads: int
    kv_heads: int
    query_length: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    key_format: Format
    value_format: Format
    key_scale_dtype: mx.Dtype
    value_scale_dtype: mx.Dtype
    mask: str
    has_sinks: bool
    rope_dim: int  # 0 without a rope term
    shared_kv: bool  # values are the very tensor that keys are (absorbed MLA): read and dequantize it once


@dataclass(slots=True)
class AttentionCall:
    """The arguments of one call, checked. Nobody changes one.

    queries: ``[B, Hq, L, D]``; keys: ``[B, Hkv, N, D]``; values: ``[B, Hkv, N, Dv]``, each with its own format. D and
        Dv are stored row lengths, multiples of 32. The queries are as the keys are stored: rotated where these are,
        and padded, with zeros. The output is as the values are stored, and :meth:`finish` brings it back.
    scale: multiplies ``queries @ keys^T``.
    mask: ``None``, ``"causal"`` (the last query sees all keys, each earlier one a key fewer), or an array that
        broadcasts to ``[B, Hq, L, N]``: boolean (true: attend) or floating (added to the scores; ``-inf`` excludes).
        It has 4 dimensions, of size 1 where it broadcasts.
    sinks: ``[Hq]`` logits that enter the softmax's denominator, or ``None``.
    rope: the second score term of absorbed MLA, or ``None``.
    signature: the static description.

    A row with no key left gives zeros.
    """

    queries: mx.array
    keys: QuantizedTensor
    values: QuantizedTensor
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None
    rope: RopeTerm | None
    signature: Signature

    def finish(self, out: mx.array) -> mx.array:
        """``[B, Hq, L, values.dim]`` from the output ``[B, Hq, L, Dv]`` of a kernel: no padding, no rotation."""
        dim = self.values.dim
        out = out if dim == self.signature.value_dim else out[..., :dim]
        return rotate(out) if self.values.format.rotated else out

    @property
    def key_count(self) -> int:
        return self.keys.shape[2]

    @property
    def stack(self) -> PackedStack | None:
        """The stack of keys and values, in this order, where they are one: its two arrays hold all their parts."""
        stack = self.keys.stack
        if stack is None or stack is not self.values.stack or (self.keys.index, self.values.index) != (0, 1):
            return None
        return stack if stack.count == 2 else None


def check_call(
    queries: mx.array,
    keys: QuantizedTensor | StackMember,
    values: QuantizedTensor | StackMember,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    rope: RopeTerm | None = None,
) -> AttentionCall:
    """Check the arguments of a call (see :class:`AttentionCall`) and describe it.

    Raises:
        TypeError: an argument of a type or dtype that is not taken.
        ValueError: shapes that do not go together. The message names the argument, what was given and what is taken.
    """
    kinds = _kind_of_mask(mask), sinks is not None, 0 if rope is None else rope.queries.shape[-1]
    signature = _seen(queries, keys, values, kinds) or _describe(queries, keys, values, kinds)
    if mask is not None:
        mask = _check_mask(mask, signature, keys.shape[2])
    if sinks is not None:
        _check_sinks(sinks, signature.query_heads)
    if rope is not None:
        _check_rope(rope, signature, keys.shape[2])
    if keys.format.rotated:
        queries = rotate(queries)
    padding = signature.key_dim - keys.dim
    if padding:
        queries = mx.pad(queries, [(0, 0), (0, 0), (0, 0), (0, padding)])
    # A stack member answers for the tensor that it stands for.
    return AttentionCall(queries, keys, values, float(scale), mask, sinks, rope, signature)  # type: ignore[arg-type]


_Kinds = tuple[str, bool, int]
"""Of a call: the kind of its mask, whether it has sinks, and the length of its rope term's rows."""
_signatures: dict[Signature, Signature] = {}
"""Each signature that calls have had, once."""
_MOST_SEEN = 64
"""Kinds of calls that are remembered for a cache."""


def _seen(
    queries: mx.array, keys: QuantizedTensor | StackMember, values: QuantizedTensor | StackMember, kinds: _Kinds
) -> Signature | None:
    """The signature of a call like an earlier one over the same cache: its queries, keys and values need no check.

    There is none but for keys and values of one stack.
    """
    stack: PackedStack | None = getattr(keys, "stack", None)
    of_values: PackedStack | None = getattr(values, "stack", None)
    if stack is None or stack is not of_values or type(queries) is not mx.array:
        return None
    return cast("Signature | None", stack.signatures.get(_kind_of_call(queries, keys, values, kinds)))


def _kind_of_call(
    queries: mx.array, keys: QuantizedTensor | StackMember, values: QuantizedTensor | StackMember, kinds: _Kinds
) -> tuple[object, ...]:
    """What of a call's signature is not the same for all stacks of a cache."""
    batch, kv_heads, _, _ = keys.shape
    return queries.shape, queries.dtype, batch, kv_heads, values is keys, kinds


def _describe(
    queries: mx.array, keys: QuantizedTensor | StackMember, values: QuantizedTensor | StackMember, kinds: _Kinds
) -> Signature:
    """The signature of a call with these queries, keys and values, which are checked."""
    batch, query_heads, length, _ = shape = _check_queries(queries)
    kv_heads = _check_keys_values(shape, keys, values)
    mask_kind, has_sinks, rope_dim = kinds
    signature = Signature(
        batch, query_heads, kv_heads, length, keys.padded_dim, values.padded_dim, queries.dtype,
        keys.format.packing, values.format.packing, keys.scale_dtype, values.scale_dtype,
        "none" if mask_kind == "causal" and length == 1 else mask_kind, has_sinks, rope_dim, values is keys,
    )  # fmt: skip
    signature = _signatures.setdefault(signature, signature)
    stack: PackedStack | None = keys.stack
    if stack is not None and values.stack is stack:
        if len(stack.signatures) >= _MOST_SEEN:
            stack.signatures.clear()
        stack.signatures[_kind_of_call(queries, keys, values, kinds)] = signature
    return signature


def _check_queries(queries: mx.array) -> tuple[int, int, int, int]:
    if not isinstance(queries, mx.array) or queries.dtype not in _FLOATS:
        given = queries.dtype if isinstance(queries, mx.array) else type(queries).__name__
        raise TypeError(f"queries are {given}: give an array of float16, bfloat16 or float32")
    shape = queries.shape
    if len(shape) != 4:
        raise ValueError(f"queries have shape {shape}: give [batch, heads, length, head_dim]")
    return shape


def _check_keys_values(
    queries: tuple[int, ...], keys: QuantizedTensor | StackMember, values: QuantizedTensor | StackMember
) -> int:
    """The number of key heads. ``queries`` is their shape."""
    if type(keys) not in _TENSORS or type(values) not in _TENSORS:
        name, given = ("values", values) if type(keys) in _TENSORS else ("keys", keys)
        raise TypeError(f"{name} are {type(given).__name__}: give a QuantizedTensor (see quantize)")
    key_shape, value_shape = keys.shape, values.shape
    if len(key_shape) != 4 or len(value_shape) != 4:
        name, shape = ("values", value_shape) if len(key_shape) == 4 else ("keys", key_shape)
        raise ValueError(f"{name} have shape {shape}: give [batch, kv_heads, count, head_dim]")
    batch, query_heads, _, dim = queries
    k_batch, kv_heads, count, _ = key_shape
    if k_batch != batch or keys.dim != dim:
        raise ValueError(f"keys have shape {key_shape}: queries {queries} take [{batch}, kv_heads, count, {dim}]")
    if kv_heads == 0 or query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads are no multiple of {kv_heads} key heads")
    if value_shape[:3] != key_shape[:3]:
        raise ValueError(
            f"values have shape {value_shape}: keys {key_shape} take [{batch}, {kv_heads}, {count}, value_dim]"
        )
    return kv_heads


def _kind_of_mask(mask: mx.array | str | None) -> str:
    """As a :class:`Signature` names it."""
    if mask is None:
        return "none"
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask={mask!r}: the only mask with a name is 'causal'")
        return mask
    if not isinstance(mask, mx.array):
        raise TypeError(f"mask is {type(mask).__name__}: give None, 'causal' or an array")
    if mask.dtype == mx.bool_:
        return "bool"
    if mask.dtype not in _FLOATS:
        raise TypeError(f"mask is {mask.dtype}: give a boolean mask or one of float16, bfloat16 or float32")
    return "additive"


def _check_mask(mask: mx.array | str, signature: Signature, count: int) -> mx.array | str | None:
    """The mask of a call over ``count`` keys, with 4 dimensions; ``None`` where it excludes nothing."""
    full = (signature.batch, signature.query_heads, signature.query_length, count)
    if isinstance(mask, str):
        if full[2] > full[3]:
            raise ValueError(f"mask='causal' with {full[2]} queries takes as many keys or more; there are {full[3]}")
        return None if signature.mask == "none" else mask
    shape = tuple(mask.shape)
    padded = (1,) * (4 - len(shape)) + shape
    if len(shape) > 4 or any(m not in (1, f) for m, f in zip(padded, full, strict=True)):
        raise ValueError(f"mask has shape {shape}: it must broadcast to {full} (batch, query heads, queries, keys)")
    return mask if len(shape) == 4 else mask.reshape(padded)


def _check_sinks(sinks: mx.array, query_heads: int) -> None:
    if not isinstance(sinks, mx.array) or sinks.dtype not in _FLOATS:
        given = sinks.dtype if isinstance(sinks, mx.array) else type(sinks).__name__
        raise TypeError(f"sinks are {given}: give an array of float16, bfloat16 or float32")
    if tuple(sinks.shape) != (query_heads,):
        raise ValueError(f"sinks have shape {tuple(sinks.shape)}: give one for each query head, ({query_heads},)")


def _check_rope(rope: RopeTerm, signature: Signature, count: int) -> None:
    batch, heads, length = signature.batch, signature.query_heads, signature.query_length
    if tuple(rope.queries.shape[:3]) != (batch, heads, length):
        raise ValueError(
            f"rope queries have shape {tuple(rope.queries.shape)}: give [{batch}, {heads}, {length}, rope_dim]"
        )
    expected = (batch, 1, count, rope.queries.shape[-1])
    if tuple(rope.keys.shape) != expected:
        raise ValueError(f"rope keys have shape {tuple(rope.keys.shape)}: give {expected}")
