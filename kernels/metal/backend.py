"""Fused attention over quantized keys and values on Apple GPUs, through ``mx.fast.metal_kernel``.

See ``kernels/backends.py`` for what a backend is, ``plan.py`` for the kinds of kernel, and the Metal sources beside it
for how they work.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, cast

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall, Signature
from qsdpa_patch.kernels.dequantized_sdpa import has_fused_sdpa
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.metal import first_use, sources
from qsdpa_patch.kernels.metal.plan import MAX_SPLITS, Family, Kind, core_count, family_of, plan_launch

__all__ = ["attend", "has_fused_kernel", "is_available"]

MAX_DECODE_LENGTH = 16
"""With more query rows attention is bound by arithmetic, and MLX's own fused SDPA over dequantized keys, where it has
one for the shape, is the better tuned."""
MAX_GROUP = 128
MAX_DIM = 512
_MERGE_THREADS = 128


def metal_kernel(**options: Any) -> Callable[..., list[mx.array]]:
    """``mx.fast.metal_kernel``; tests put an emulator here."""
    return cast(Callable[..., list[mx.array]], mx.fast.metal_kernel(**options))


@cache
def is_available() -> tuple[bool, str]:
    """Whether this machine has a GPU that Metal kernels run on, and if not, why."""
    if not mx.metal.is_available():
        return False, f"MLX has no Metal device here ({platform.system()}, {platform.machine()})"
    return True, ""


@lru_cache(maxsize=4096)
def has_fused_kernel(signature: Signature) -> tuple[bool, str]:
    """Whether calls of ``signature`` are taken, and if not, why.

    The first signature of a kernel family compiles the kernel and holds it against the reference on a tiny input.
    """
    available, reason = is_available()
    if not available:
        return False, reason
    reason = _unsupported(signature)
    if reason:
        return False, reason
    return first_use.check(family_of(signature), signature, attend)


def _unsupported(sig: Signature) -> str:
    """Why no kernel takes calls of ``sig``, or an empty string."""
    if sig.query_length > MAX_DECODE_LENGTH and not sig.rope_dim and has_fused_sdpa(sig)[0]:
        return f"{sig.query_length} query rows, for which MLX has a fused kernel over dequantized keys"
    if sig.query_length == 0 or sig.batch == 0:
        return "no query rows"
    if sig.query_heads // sig.kv_heads > MAX_GROUP:
        return f"{sig.query_heads // sig.kv_heads} query heads share a key head: at most {MAX_GROUP} may"
    for name, dim in (("keys", sig.key_dim), ("values", sig.value_dim)):
        if dim > MAX_DIM or dim % 32:
            return f"rows of the {name} have {dim} numbers: multiples of 32 up to {MAX_DIM} are taken"
    if sig.rope_dim % 32:
        return f"a rope term of {sig.rope_dim} dims: multiples of 32 are taken"
    return ""


def attend(call: AttentionCall) -> mx.array:
    """Attention ``[B, Hq, L, Dv]`` of ``call`` in the queries' dtype; see :func:`has_fused_kernel`.

    One kernel serves decode and prefill: it takes the rows of a key head in blocks, and dequantizes keys once a block.

    The innermost stride of codes, scales and biases is 1, as in any slice of an array that ``mx.quantize`` made.
    """
    signature = call.signature
    shape = (signature.batch, signature.query_heads, signature.query_length, signature.value_dim)
    if call.key_count == 0:
        return mx.zeros(shape, signature.dtype)
    family = family_of(signature)
    launch = plan_launch(signature, family, call.key_count, core_count())
    split = launch.splits > 1
    dtype = mx.float32 if split else signature.dtype
    row_shape = (*shape[:3], launch.splits) if split else shape[:3]
    outputs = _decode_kernel(family, split, call.stack is not None)(
        inputs=_inputs(call, split),
        grid=(signature.kv_heads * launch.blocks * 32 * family.simdgroups, launch.splits, signature.batch),
        output_shapes=[(*row_shape, signature.value_dim), (*row_shape, 2)][: 1 + split],
        output_dtypes=[dtype, mx.float32][: 1 + split],
    )
    if not split:
        return outputs[0]
    rows = shape[0] * shape[1] * shape[2]
    return _merge_kernel(signature.has_sinks, signature.dtype)(
        inputs=[*outputs, *([call.sinks] if signature.has_sinks else [])],
        grid=(rows * _MERGE_THREADS, 1, 1),
        output_shapes=[shape],
        output_dtypes=[signature.dtype],
    )[0]


def _inputs(call: AttentionCall, split: bool) -> list[mx.array]:
    """The arrays of a call, in the order of :func:`_input_names`."""
    inputs = [mx.contiguous(call.queries), _scalar(call.scale)]
    stack = call.stack
    if stack is not None:
        inputs += [stack.codes, stack.scales]
    else:
        inputs += call.keys.parts
        if not call.signature.shared_kv:
            inputs += call.values.parts
    if isinstance(call.mask, mx.array):
        inputs.append(call.mask)
    if call.sinks is not None and not split:
        inputs.append(call.sinks)
    if call.rope is not None:
        inputs += [mx.contiguous(call.rope.queries), call.rope.keys]
    return inputs


def _input_names(signature: Signature, split: bool, stacked: bool) -> list[str]:
    names = ["queries", "scale"]
    if stacked:
        names += ["codes", "scales"]
    else:
        names += _part_names("key", signature.key_format)
        if not signature.shared_kv:
            names += _part_names("value", signature.value_format)
    if signature.mask in ("bool", "additive"):
        names.append("mask")
    if signature.has_sinks and not split:
        names.append("sinks")
    if signature.rope_dim:
        names += ["rope_queries", "rope_keys"]
    return names


def _part_names(prefix: str, format: Format) -> list[str]:
    return [f"{prefix}_{part}" for part in ("codes", "scales", "biases")[: 2 + format.has_biases]]


@lru_cache(maxsize=64)
def _scalar(value: float) -> mx.array:
    return mx.array(value, mx.float32)


def _template(family: Family) -> list[tuple[str, int | bool | mx.Dtype]]:
    signature = family.signature
    arguments: list[tuple[str, int | bool | mx.Dtype]] = [
        ("T", signature.dtype),
        ("KEY_DIM", signature.key_dim),
        ("VALUE_DIM", signature.value_dim),
        ("ROPE_DIM", signature.rope_dim),
        ("ROWS", family.rows),
        ("TILE", family.tile),
        ("SIMDGROUPS", family.simdgroups),
        ("TEAM", family.kind is Kind.TEAM),
    ]
    for name, format in (("KEY", signature.key_format), ("VALUE", signature.value_format)):
        arguments += [
            (f"{name}_MODE", sources.mode_of(format)),
            (f"{name}_BITS", format.bits),
            (f"{name}_GROUP", format.group_size),
        ]
    return arguments


@cache
def _decode_kernel(family: Family, split: bool, stacked: bool) -> Callable[..., list[mx.array]]:
    """The kernel, with the arguments that all its launches share.

    stacked: keys and values come as the two arrays of a :class:`PackedStack`.
    """
    kernel = metal_kernel(
        name="qsdpa_decode_split" if split else "qsdpa_decode",
        input_names=_input_names(family.signature, split, stacked),
        output_names=["partials", "stats"] if split else ["output"],
        header=sources.decode_header(family.signature, split, stacked),
        source=sources.decode_body(family.kind),
        ensure_row_contiguous=False,
    )
    return partial(kernel, template=_template(family), threadgroup=(32 * family.simdgroups, 1, 1))


@cache
def _merge_kernel(has_sinks: bool, dtype: mx.Dtype) -> Callable[..., list[mx.array]]:
    kernel = metal_kernel(
        name="qsdpa_merge",
        input_names=["partials", "stats", *(["sinks"] if has_sinks else [])],
        output_names=["output"],
        header=sources.merge_header(has_sinks),
        source=sources.merge_body(),
    )
    return partial(kernel, template=[("T", dtype), ("MAX_SPLITS", MAX_SPLITS)], threadgroup=(_MERGE_THREADS, 1, 1))
