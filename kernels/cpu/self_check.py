"""One small call against the reference, before a freshly loaded library is trusted."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from qsdpa_patch.kernels import reference
from qsdpa_patch.kernels.attention_call import AttentionCall, check_call
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import quantize, stack_alike

__all__ = ["wrong_results"]


def wrong_results(attend: Callable[[AttentionCall], mx.array]) -> str:
    """What is wrong with the results of ``attend``; empty when they are right.

    Few and many rows, in float32 and in 16 bits, which differ in arithmetic; keys and values in arrays of their own and
    in a stack. The numbers come from no random generator: the user's is left alone.
    """
    with mx.stream(mx.cpu):
        for length, dtype, stacked in (
            (1, mx.float32, False),
            (9, mx.float32, False),
            (1, mx.float16, False),
            (1, mx.float16, True),
        ):
            tolerance = 1e-4 if dtype == mx.float32 else 5e-3
            call = _small_call(length, dtype, stacked)
            wanted = reference.attend(call).astype(mx.float32)
            error = float(mx.abs(attend(call).astype(mx.float32) - wanted).max())
            if not error <= tolerance * float(mx.abs(wanted).max()):
                return f"its results differ from the reference by up to {error:.2g}"
    return ""


def _small_call(length: int, dtype: mx.Dtype, stacked: bool) -> AttentionCall:
    def numbers(*shape: int) -> mx.array:
        count = 1
        for n in shape:
            count *= n
        return mx.sin(mx.arange(count, dtype=mx.float32) ** 1.5).reshape(shape).astype(dtype)

    keys = quantize(numbers(1, 2, 100, 64), Format.affine(4, 32))
    if stacked:
        pair = stack_alike(keys, quantize(numbers(1, 2, 100, 64) + 0.5, keys.format))
        assert pair is not None
        keys, values = pair
    else:
        values = quantize(numbers(1, 2, 100, 96) + 0.5, Format.affine(6, 32))
    return check_call(numbers(1, 4, length, 64), keys, values, scale=0.125, mask="causal")
