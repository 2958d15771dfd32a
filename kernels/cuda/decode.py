"""Launch of the decode kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.cuda.plan import DecodePlan
from qsdpa_patch.kernels.cuda.scales import device_scale
from qsdpa_patch.kernels.cuda.source import DECODE_OUTPUTS, cuda_type, decode_body, decode_inputs, prologue
from qsdpa_patch.kernels.cuda.tickets import take_tickets

__all__ = ["DecodeKernel", "decode_kernel"]

_NAME = "qsdpa_decode"
_Kernel = Callable[..., list[mx.array]]


@cache
def decode_kernel(plan: DecodePlan) -> DecodeKernel:
    """The kernel of ``plan``, compiled by MLX when a result of it is first evaluated."""
    return DecodeKernel(plan)


class DecodeKernel:
    """The decode kernel for calls of one signature.

    plan: how it runs. source: text that tells compiled kernels apart; several signatures may share it.
    """

    def __init__(self, plan: DecodePlan) -> None:
        self.plan = plan
        self.source = decode_body(_NAME, plan, "float", "float")
        sig = plan.signature
        self._row_tiles = sig.kv_heads * plan.row_tiles
        self._out_shape = (sig.batch, sig.query_heads, sig.query_length, sig.value_dim)
        self._dtypes = [sig.dtype, mx.float32, mx.float32]
        self._variants: dict[tuple[mx.Dtype | None, mx.Dtype | None], _Kernel] = {}

    def __call__(self, call: AttentionCall) -> mx.array:
        """Attention ``[B, Hq, L, Dv]`` of ``call``, lazy."""
        plan, sig = self.plan, self.plan.signature
        mask = call.mask if isinstance(call.mask, mx.array) else None
        inputs = [call.queries, *call.keys.parts]
        if not sig.shared_kv:
            inputs.extend(call.values.parts)
        if mask is not None:
            inputs.append(mask)
        if call.sinks is not None:
            inputs.append(call.sinks)
        if call.rope is not None:
            inputs += (call.rope.queries, call.rope.keys)
        inputs.append(device_scale(call.scale))
        splits = plan.splits(call.key_count)
        tiles = sig.batch * self._row_tiles
        inputs.append(take_tickets(tiles))
        partial_rows = tiles * splits * plan.rows if splits > 1 else 0
        return self._variant(mask, call.sinks)(
            inputs=inputs,
            grid=(plan.threads * splits, self._row_tiles, sig.batch),
            threadgroup=(plan.threads, 1, 1),
            output_shapes=[self._out_shape, (max(1, partial_rows * sig.value_dim),), (max(1, partial_rows * 2),)],
            output_dtypes=self._dtypes,
        )[0]

    def _variant(self, mask: mx.array | None, sinks: mx.array | None) -> _Kernel:
        """The kernel for the dtypes of this call's mask and sinks, which a signature leaves open."""
        key = (None if mask is None else mask.dtype, None if sinks is None else sinks.dtype)
        if key not in self._variants:
            plan = self.plan
            mask_type, sink_type = (cuda_type(dtype or mx.float32) for dtype in key)
            kernel = mx.fast.cuda_kernel(
                name=_NAME,
                input_names=decode_inputs(plan.signature),
                output_names=DECODE_OUTPUTS,
                source=decode_body(_NAME, plan, mask_type, sink_type),
                header=prologue(_NAME, plan.threads),
                ensure_row_contiguous=False,
                shared_memory=plan.shared_bytes,
            )
            self._variants[key] = cast(_Kernel, kernel)
        return self._variants[key]
