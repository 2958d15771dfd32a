"""The CUDA backend: fused attention over quantized keys and values through ``mx.fast.cuda_kernel``.

See :mod:`qsdpa_patch.kernels.backends` for the contract.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall, Signature
from qsdpa_patch.kernels.backends import Declined
from qsdpa_patch.kernels.cuda.decode import DecodeByLength, DecodeKernel, decode_kernel
from qsdpa_patch.kernels.cuda.decode_plan import decode_plan
from qsdpa_patch.kernels.cuda.device import DeviceLimits, device_limits
from qsdpa_patch.kernels.cuda.mla import MlaKernel, mla_kernel
from qsdpa_patch.kernels.cuda.mla_plan import mla_plan
from qsdpa_patch.kernels.cuda.planning import MAX_QUERY_LENGTH, Unsupported
from qsdpa_patch.kernels.cuda.prefill import PrefillKernel, prefill_kernel
from qsdpa_patch.kernels.cuda.prefill_plan import CHECKED_LENGTH, prefill_plan
from qsdpa_patch.kernels.cuda.self_check import failure
from qsdpa_patch.kernels.cuda.wide_plan import wide_plan
from qsdpa_patch.kernels.dequantized_sdpa import has_fused_sdpa
from qsdpa_patch.kernels.identity import cached_by_identity

__all__ = ["attend", "has_fused_kernel", "is_available"]

MINIMUM_CAPABILITY = (8, 0)


@cache
def is_available() -> tuple[bool, str]:
    """Whether MLX runs on a CUDA device that has the instructions the kernels use."""
    if not mx.cuda.is_available():
        return False, "this build of MLX has no CUDA backend"
    limits = device_limits()
    if limits is None:
        return False, "the CUDA driver finds no device"
    if limits.capability < MINIMUM_CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (limits.capability, MINIMUM_CAPABILITY))
        return False, f"the device has compute capability {have}; the kernels need {need}"
    return True, ""


@cache
def has_fused_kernel(signature: Signature) -> tuple[bool, str]:
    """Whether a kernel takes calls of ``signature``, and if not, why.

    The first call for a kernel compiles it and holds it against the reference on a small problem.
    """
    available, reason = is_available()
    if not available:
        return False, reason
    kernel = _kernel(signature)
    return (False, kernel) if isinstance(kernel, str) else (True, "")


def attend(call: AttentionCall) -> mx.array:
    """Attention ``[B, Hq, L, Dv]`` of ``call`` in the queries' dtype. See :class:`AttentionCall`.

    Raises:
        Declined: where the rope term is of another dtype than the queries.
    """
    rope = call.rope
    if rope is not None and not rope.queries.dtype == rope.keys.dtype == call.signature.dtype:
        raise Declined(f"rope term of {rope.queries.dtype} and {rope.keys.dtype} with {call.signature.dtype} queries")
    kernel = _kernel_of_calls(call.signature)
    if isinstance(kernel, str):
        raise Declined(kernel)
    return kernel(call)


@cache
def _kernel(signature: Signature) -> DecodeKernel | DecodeByLength | MlaKernel | PrefillKernel | str:
    """The fastest kernel that takes ``signature`` and passes its check on this device, or why there is none."""
    limits = device_limits()
    assert limits is not None
    if signature.query_length > MAX_QUERY_LENGTH:
        if not signature.rope_dim and has_fused_sdpa(signature)[0]:
            return f"{signature.query_length} query rows, for which MLX has a fused kernel over dequantized keys"
        try:
            few = signature._replace(batch=1, query_length=CHECKED_LENGTH)  # the kernel is the same
            problem = failure(prefill_kernel(prefill_plan(few, limits)))
            return problem or prefill_kernel(prefill_plan(signature, limits))
        except Unsupported as error:
            return str(error)
    try:
        kernel = mla_kernel(mla_plan(signature, limits))
        if not failure(kernel):
            return kernel
    except Unsupported:
        pass  # the general kernel may
    return _decode_kernel(signature, limits)


_kernel_of_calls = cached_by_identity(_kernel)


def _decode_kernel(signature: Signature, limits: DeviceLimits) -> DecodeKernel | DecodeByLength | str:
    """The general kernel, the one with warpgroup products, or both, each for the contexts that it is faster for.

    Both are compiled at once, so that a text that grows is never held up.
    """
    wide: DecodeKernel | None = None
    fewest_keys = 0
    try:
        plan = wide_plan(signature, limits)
        if not failure(decode_kernel(plan)):
            wide, fewest_keys = decode_kernel(plan), plan.fewest_keys
    except Unsupported:
        pass  # the general kernel may
    if wide is not None and fewest_keys == 0:
        return wide
    try:
        general = decode_kernel(decode_plan(signature, limits))
    except Unsupported as error:
        return wide or str(error)
    problem = failure(general)
    if wide is None:
        return problem or general
    return wide if problem else DecodeByLength(general, wide, fewest_keys)
