"""Launch of the kernel for absorbed MLA, and of the merge of its splits."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.cuda.custom_kernel import CustomKernel, custom_kernel
from qsdpa_patch.kernels.cuda.mla_plan import MlaPlan
from qsdpa_patch.kernels.cuda.scales import device_scale
from qsdpa_patch.kernels.cuda.source import (
    MLA_HEADERS,
    MLA_OUTPUTS,
    cuda_type,
    mla_body,
    mla_inputs,
    mla_merge_body,
    mla_merge_inputs,
    prologue,
)

__all__ = ["MlaKernel", "mla_kernel"]

_NAME = "qsdpa_mla"
_MERGE_NAME = "qsdpa_mla_merge"


@cache
def mla_kernel(plan: MlaPlan) -> MlaKernel:
    """The kernel of ``plan``, compiled by MLX when a result of it is first evaluated."""
    return MlaKernel(plan)


class MlaKernel:
    """The kernel for calls of one signature of absorbed MLA.

    plan: how it runs. source: text that tells compiled kernels apart; several signatures may share it.
    """

    def __init__(self, plan: MlaPlan) -> None:
        self.plan = plan
        sig = plan.signature
        self.source = mla_body(_NAME, plan, "float") + mla_merge_body(_MERGE_NAME, plan, "float")
        self._out_shape = (sig.batch, sig.query_heads, sig.query_length, sig.value_dim)
        self._attention: dict[mx.Dtype | None, CustomKernel] = {}
        self._merge: dict[mx.Dtype | None, CustomKernel] = {}

    def __call__(self, call: AttentionCall) -> mx.array:
        """Attention ``[B, Hq, L, R]`` of ``call``, lazy."""
        plan, sig = self.plan, self.plan.signature
        assert call.rope is not None
        mask = call.mask if isinstance(call.mask, mx.array) else None
        inputs = [call.queries, *call.keys.parts]
        if mask is not None:
            inputs.append(mask)
        inputs += (call.rope.queries, call.rope.keys, device_scale(call.scale))
        splits, tiles = plan.splits(call.key_count), sig.batch * plan.row_tiles
        partials = self._attention_kernel(None if mask is None else mask.dtype)(
            inputs=inputs,
            grid=(plan.threads * splits, plan.row_tiles, sig.batch),
            threadgroup=(plan.threads, 1, 1),
            output_shapes=[(tiles, splits, plan.rows, sig.value_dim), (tiles, splits, plan.rows, 2)],
            output_dtypes=[sig.dtype, mx.float32],
        )
        sinks = call.sinks
        return self._merge_kernel(None if sinks is None else sinks.dtype)(
            inputs=[*partials, call.queries] if sinks is None else [*partials, call.queries, sinks],
            grid=(plan.merge_threads * (sig.value_dim // 8), plan.row_tiles, sig.batch),
            threadgroup=(plan.merge_threads, 1, 1),
            output_shapes=[self._out_shape],
            output_dtypes=[sig.dtype],
        )[0]

    def _attention_kernel(self, mask_dtype: mx.Dtype | None) -> CustomKernel:
        """The kernel for the dtype of this call's mask, which a signature leaves open."""
        if mask_dtype not in self._attention:
            plan = self.plan
            self._attention[mask_dtype] = custom_kernel(
                _NAME,
                mla_inputs(plan.signature),
                MLA_OUTPUTS,
                mla_body(_NAME, plan, cuda_type(mask_dtype or mx.float32)),
                prologue(_NAME, plan.threads, MLA_HEADERS),
                plan.shared_bytes,
            )
        return self._attention[mask_dtype]

    def _merge_kernel(self, sink_dtype: mx.Dtype | None) -> CustomKernel:
        if sink_dtype not in self._merge:
            plan = self.plan
            self._merge[sink_dtype] = custom_kernel(
                _MERGE_NAME,
                mla_merge_inputs(plan.signature),
                ["out"],
                mla_merge_body(_MERGE_NAME, plan, cuda_type(sink_dtype or mx.float32)),
                prologue(_MERGE_NAME, plan.merge_threads, MLA_HEADERS),
            )
        return self._merge[sink_dtype]
