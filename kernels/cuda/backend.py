"""The CUDA backend: fused attention over quantized keys and values through ``mx.fast.cuda_kernel``.

See :mod:`qsdpa_patch.kernels.backends` for the contract.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall, Signature
from qsdpa_patch.kernels.backends import Declined
from qsdpa_patch.kernels.cuda.decode import DecodeKernel, decode_kernel
from qsdpa_patch.kernels.cuda.device import device_limits
from qsdpa_patch.kernels.cuda.plan import Unsupported, decode_plan
from qsdpa_patch.kernels.cuda.self_check import failure

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
    try:
        kernel = _kernel(signature)
    except Unsupported as error:
        return False, str(error)
    problem = failure(kernel)
    return (False, problem) if problem else (True, "")


def attend(call: AttentionCall) -> mx.array:
    """Attention ``[B, Hq, L, Dv]`` of ``call`` in the queries' dtype. See :class:`AttentionCall`.

    Raises:
        Declined: where the rope term is of another dtype than the queries.
    """
    rope = call.rope
    if rope is not None and not rope.queries.dtype == rope.keys.dtype == call.signature.dtype:
        raise Declined(f"rope term of {rope.queries.dtype} and {rope.keys.dtype} with {call.signature.dtype} queries")
    return _kernel(call.signature)(call)


@cache
def _kernel(signature: Signature) -> DecodeKernel:
    limits = device_limits()
    assert limits is not None
    return decode_kernel(decode_plan(signature, limits))
