"""Launch of the kernel for many query rows."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.cuda.custom_kernel import CustomKernel, custom_kernel
from qsdpa_patch.kernels.cuda.prefill_plan import PrefillPlan
from qsdpa_patch.kernels.cuda.scales import device_scale
from qsdpa_patch.kernels.cuda.source import PREFILL_HEADERS, cuda_type, prefill_body, prefill_inputs, prologue

__all__ = ["PrefillKernel", "prefill_kernel"]

_NAME = "qsdpa_prefill"


@cache
def prefill_kernel(plan: PrefillPlan) -> PrefillKernel:
    """The kernel of ``plan``, compiled by MLX when a result of it is first evaluated."""
    return PrefillKernel(plan)


class PrefillKernel:
    """The kernel for calls of one signature with many query rows.

    plan: how it runs. source: text that tells compiled kernels apart; signatures of any query length share it.
    """

    def __init__(self, plan: PrefillPlan) -> None:
        self.plan = plan
        self.source = prefill_body(_NAME, plan, "float", "float")
        sig = plan.signature
        self._out_shape = (sig.batch, sig.query_heads, sig.query_length, sig.value_dim)
        self._variants: dict[tuple[mx.Dtype | None, mx.Dtype | None], CustomKernel] = {}

    def __call__(self, call: AttentionCall) -> mx.array:
        """Attention ``[B, Hq, L, Dv]`` of ``call``, lazy."""
        plan, sig = self.plan, self.plan.signature
        if call.key_count == 0:
            return mx.zeros(self._out_shape, sig.dtype)
        mask = call.mask if isinstance(call.mask, mx.array) else None
        inputs = [call.queries, *call.keys.parts, *call.values.parts]
        if mask is not None:
            inputs.append(mask)
        if call.sinks is not None:
            inputs.append(call.sinks)
        inputs.append(device_scale(call.scale))
        return self._variant(mask, call.sinks)(
            inputs=inputs,
            grid=(plan.threads * plan.row_tiles, sig.kv_heads, sig.batch),
            threadgroup=(plan.threads, 1, 1),
            output_shapes=[self._out_shape],
            output_dtypes=[sig.dtype],
        )[0]

    def _variant(self, mask: mx.array | None, sinks: mx.array | None) -> CustomKernel:
        """The kernel for the dtypes of this call's mask and sinks, which a signature leaves open."""
        key = (None if mask is None else mask.dtype, None if sinks is None else sinks.dtype)
        if key not in self._variants:
            plan = self.plan
            mask_type, sink_type = (cuda_type(dtype or mx.float32) for dtype in key)
            self._variants[key] = custom_kernel(
                _NAME,
                prefill_inputs(plan.signature),
                ["out"],
                prefill_body(_NAME, plan, mask_type, sink_type),
                prologue(_NAME, plan.threads, PREFILL_HEADERS),
                plan.shared_bytes,
            )
        return self._variants[key]
