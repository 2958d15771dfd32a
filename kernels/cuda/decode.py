"""Launch of the decode kernels: the general one, and the one with warpgroup products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.cuda.custom_kernel import CustomKernel, custom_kernel
from qsdpa_patch.kernels.cuda.decode_plan import DecodePlan
from qsdpa_patch.kernels.cuda.scales import device_scale, repeated
from qsdpa_patch.kernels.cuda.source import (
    DECODE_HEADERS,
    DECODE_OUTPUTS,
    WIDE_HEADERS,
    cuda_type,
    decode_body,
    decode_inputs,
    prologue,
)
from qsdpa_patch.kernels.cuda.tickets import take_tickets, ticket_size
from qsdpa_patch.kernels.cuda.wide_plan import WidePlan

__all__ = ["DecodeByLength", "DecodeKernel", "decode_kernel"]

_NAME = "qsdpa_decode"


@cache
def decode_kernel(plan: DecodePlan | WidePlan) -> DecodeKernel:
    """The kernel of ``plan``, compiled by MLX when a result of it is first evaluated."""
    return DecodeKernel(plan)


class DecodeKernel:
    """A decode kernel for calls of one signature.

    plan: how it runs. source: text that tells compiled kernels apart; several signatures may share it.
    """

    def __init__(self, plan: DecodePlan | WidePlan) -> None:
        self.plan = plan
        self.source = decode_body(_NAME, plan, "float", "float")
        sig = plan.signature
        self._row_tiles = sig.kv_heads * plan.row_tiles
        self._tiles = sig.batch * self._row_tiles
        self._ticket_size = ticket_size(self._tiles)
        self._variants: dict[tuple[mx.Dtype | None, mx.Dtype | None, bool], CustomKernel] = {}
        self._launches: dict[int, dict[str, object]] = {}
        self._latest: tuple[int, dict[str, object]] = (-1, {})

    def __call__(self, call: AttentionCall) -> mx.array:
        """Attention ``[B, Hq, L, Dv]`` of ``call``, lazy."""
        mask = call.mask if isinstance(call.mask, mx.array) else None
        stack = call.stack
        if stack is not None:
            inputs = [call.queries, *stack.buffers]
        elif self.plan.signature.shared_kv:
            inputs = [call.queries, *call.keys.parts]
        else:
            inputs = [call.queries, *call.keys.parts, *call.values.parts]
        if mask is not None:
            inputs.append(mask)
        if call.sinks is not None:
            inputs.append(call.sinks)
        if call.rope is not None:
            inputs += (call.rope.queries, call.rope.keys)
        count = call.key_count
        tickets = take_tickets(self._ticket_size)
        if stack is None:
            inputs += (device_scale(call.scale), tickets)
        else:  # without rows that a kernel of ours writes, any array will do in their place
            inputs += (repeated(call.scale, count), tickets, tickets if stack.pending is None else stack.pending.token)
        kernel = self._variant(mask, call.sinks, stack is not None)
        return kernel(inputs=inputs, **self._launch_over(count))[0]

    def _launch_over(self, count: int) -> dict[str, object]:
        """Arguments of a launch over ``count`` keys, which are mostly those of the layer before."""
        latest = self._latest
        if latest[0] != count:
            latest = self._latest = (count, self._launch(self.plan.splits(count)))
        return latest[1]

    def _launch(self, splits: int) -> dict[str, object]:
        """Arguments of a launch that depend on the number of splits alone."""
        launch = self._launches.get(splits)
        if launch is None:
            plan, sig = self.plan, self.plan.signature
            partial_rows = self._tiles * splits * plan.rows if splits > 1 else 0
            launch = self._launches[splits] = {
                "grid": (plan.threads * splits, self._row_tiles, sig.batch),
                "threadgroup": (plan.threads, 1, 1),
                "output_dtypes": [sig.dtype, mx.float32],
                "output_shapes": [
                    (sig.batch, sig.query_heads, sig.query_length, sig.value_dim),
                    (max(1, partial_rows * (sig.value_dim + 2)),),
                ],
            }
        return launch

    def _variant(self, mask: mx.array | None, sinks: mx.array | None, stacked: bool) -> CustomKernel:
        """The kernel for what a signature leaves open: the dtypes of mask and sinks, and how keys and values come."""
        key = (None if mask is None else mask.dtype, None if sinks is None else sinks.dtype, stacked)
        kernel = self._variants.get(key)
        if kernel is None:
            plan = self.plan
            mask_type, sink_type = (cuda_type(dtype or mx.float32) for dtype in key[:2])
            kernel = self._variants[key] = custom_kernel(
                _NAME,
                decode_inputs(plan.signature, stacked),
                DECODE_OUTPUTS,
                decode_body(_NAME, plan, mask_type, sink_type, stacked=stacked),
                prologue(_NAME, plan.threads, WIDE_HEADERS if isinstance(plan, WidePlan) else DECODE_HEADERS),
                plan.shared_bytes,
            )
        return kernel


@dataclass(frozen=True)
class DecodeByLength:
    """Two kernels for calls of one signature: the one for contexts of ``fewest_keys`` and more, and the other."""

    short: DecodeKernel
    long: DecodeKernel
    fewest_keys: int

    def __call__(self, call: AttentionCall) -> mx.array:
        """Attention ``[B, Hq, L, Dv]`` of ``call``, lazy."""
        return (self.long if call.key_count >= self.fewest_keys else self.short)(call)
