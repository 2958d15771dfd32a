"""The check of a kernel family at its first use: compiled, run on a tiny input and held against the reference.

Users have devices and systems that nobody has tried these kernels on. One that does not compile there, or computes
something else, is never used: its calls go to MLX's own ops, with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import mlx.core as mx

from qsdpa_patch.kernels import reference
from qsdpa_patch.kernels.attention_call import AttentionCall, RopeTerm, Signature, check_call
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.messages import first_error
from qsdpa_patch.kernels.metal.plan import KEYS_PER_SPLIT, Family, family_of
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, quantize, stack_alike

__all__ = ["check"]

Attend = Callable[[AttentionCall], mx.array]

_TOLERANCES = {mx.float16: 2e-3, mx.bfloat16: 1e-2, mx.float32: 1e-4}
"""Wide enough for any device's exponentials: a kernel that is wrong is wrong by far more."""
_COUNTS = (37, 2 * KEYS_PER_SPLIT + 5)
"""Numbers of keys: a single launch with a part of a tile, and a split with its merge."""
_QUERY_HEADS = 8
"""Of a check at least: arrays of fewer numbers than that, such as sinks, reach a kernel in another address space, for
which Metal compiles another one."""


def check(family: Family, signature: Signature, attend: Attend) -> tuple[bool, str]:
    """Whether ``attend`` with the kernels of ``family`` is right on this machine, and if not, what it did; once."""
    group = signature.query_heads // signature.kv_heads
    kv_heads = 1 if signature.rope_dim else -(-_QUERY_HEADS // group)
    small = signature._replace(batch=1, query_heads=group * kv_heads, kv_heads=kv_heads)
    lengths = range(1, signature.query_length + 1)
    length = next(n for n in lengths if family_of(small._replace(query_length=n)) == family)
    return _check(family, small._replace(query_length=length), attend)


@cache
def _check(family: Family, signature: Signature, attend: Attend) -> tuple[bool, str]:
    try:
        calls = (_small_call(signature, max(count, signature.query_length)) for count in _COUNTS)
        errors = [_error(kind, attend) for call in calls for kind in (call, _stacked(call)) if kind is not None]
    except (RuntimeError, ValueError) as failure:
        return _refuse(family, signature, "the Metal kernel does not run here: ", str(failure))
    wrong = [error for error in errors if not error <= _TOLERANCES[signature.dtype]]  # or not a number
    if wrong:
        return _refuse(family, signature, f"the Metal kernel is wrong here by {wrong[0]:.1e} of the largest value")
    return True, ""


def _refuse(family: Family, signature: Signature, reason: str, message: str = "") -> tuple[bool, str]:
    """Warn, with the whole of ``message``; the report gets a line of it."""
    warnings.warn(
        f"qsdpa_patch: {reason}{message} (kernel {family.kind.value!r} of {family.rows} rows, keys "
        f"{signature.key_format}, values {signature.value_format}, head dim {signature.key_dim}, {signature.dtype}). "
        "Such calls take MLX's own operations from now on.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False, reason + first_error(message)


def _error(call: AttentionCall, attend: Attend) -> float:
    """Largest error of ``call``, relative to the largest magnitude of the reference."""
    actual = attend(call)
    with mx.stream(mx.cpu):  # some GPUs multiply float32 matrices with fewer bits
        wanted = reference.attend(call).astype(mx.float32)
        error, largest = mx.abs(actual.astype(mx.float32) - wanted).max(), mx.abs(wanted).max()
    return float(error) / float(largest)


def _small_call(sig: Signature, count: int) -> AttentionCall:
    """A call of the kind of ``sig`` with ``count`` keys. It leaves the global random state alone."""
    key = iter(mx.random.split(mx.random.key(0), 8))

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(key)).astype(sig.dtype)

    def stored(dim: int, format: Format, scale_dtype: mx.Dtype) -> QuantizedTensor:
        dtype = sig.dtype if scale_dtype == mx.uint8 else scale_dtype
        return quantize(normal(1, sig.kv_heads, count + 11, dim).astype(dtype), format).map_parts(
            lambda p: p[:, :, :count]
        )

    keys = stored(sig.key_dim, sig.key_format, sig.key_scale_dtype)
    values = keys if sig.shared_kv else stored(sig.value_dim, sig.value_format, sig.value_scale_dtype)
    mask: mx.array | str | None = {"none": None, "causal": "causal"}.get(sig.mask)
    if sig.mask in ("bool", "additive"):
        mask = normal(sig.query_length, count)
        mask = mask > -1 if sig.mask == "bool" else mask
    rope = None
    if sig.rope_dim:
        rope = RopeTerm(
            0.1 * normal(1, sig.query_heads, sig.query_length, sig.rope_dim), normal(1, 1, count, sig.rope_dim)
        )
    queries = normal(1, sig.query_heads, sig.query_length, sig.key_dim)
    sinks = normal(sig.query_heads) if sig.has_sinks else None
    return check_call(queries, keys, values, scale=sig.key_dim**-0.5, mask=mask, sinks=sinks, rope=rope)


def _stacked(call: AttentionCall) -> AttentionCall | None:
    """``call`` with keys and values in two arrays, as they come from a cache; ``None`` where they are not alike."""
    pair = None if call.keys is call.values else stack_alike(call.keys, call.values)
    return None if pair is None else replace(call, keys=pair[0], values=pair[1])
