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
    WIDE_HEADERS,
    cuda_type,
    decode_body,
    decode_inputs,
    decode_outputs,
    prologue,
    stores_new_rows,
)
from qsdpa_patch.kernels.cuda.tickets import take_tickets, ticket_size
from qsdpa_patch.kernels.cuda.wide_plan import WidePlan
from qsdpa_patch.kernels.pending_rows import PendingRows
from qsdpa_patch.kernels.quantized_tensor import PackedStack

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
        sig = plan.signature
        self._stores_new_rows = stores_new_rows(sig)
        self.source = decode_body(_NAME, plan, "float", "float", stacked=self._stores_new_rows)
        self._row_tiles = sig.kv_heads * plan.row_tiles
        self._tiles = sig.batch * self._row_tiles
        self._ticket_size = ticket_size(self._tiles)
        self._variants: dict[tuple[mx.Dtype | None, mx.Dtype | None, bool], CustomKernel] = {}
        self._launches: dict[tuple[int, bool], dict[str, object]] = {}
        self._latest: tuple[int, bool, dict[str, object]] = (-1, False, {})

    def __call__(self, call: AttentionCall) -> mx.array:
        """Attention ``[B, Hq, L, Dv]`` of ``call``, lazy."""
        stack = call.stack
        if stack is not None:
            return self._attend_to_stack(call, stack)
        tensors = [call.keys] if self.plan.signature.shared_kv else [call.keys, call.values]
        inputs = [call.queries, *(part for tensor in tensors for part in tensor.parts), *_others(call)]
        inputs += (device_scale(call.scale), take_tickets(self._ticket_size))
        return self._variant(call, False)(inputs=inputs, **self._launch_over(call.key_count, False))[0]

    def _attend_to_stack(self, call: AttentionCall, stack: PackedStack) -> mx.array:
        """The same where keys and values are in two arrays, of which some rows may still be pending."""
        inputs = [call.queries, *stack.buffers, *_others(call)]
        count = call.key_count
        tickets = take_tickets(self._ticket_size)
        inputs += (repeated(call.scale, count), tickets)
        kernel, launch, pending = self._variant(call, True), self._launch_over(count, True), stack.pending
        new = written = None
        if pending is not None:
            new = self._rows_to_store(stack, pending)
            written = pending.token if new is None else pending.after
        inputs.append(tickets if written is None else written)  # any array, where there is nothing to wait for
        if self._stores_new_rows:
            inputs += _no_rows(call.signature.dtype) if new is None else new
        out, _, *stored = kernel(inputs=inputs, **launch)
        if pending is not None and new is not None:
            pending.stored(stored[0])
        return out

    def _rows_to_store(self, stack: PackedStack, pending: PendingRows) -> list[mx.array] | None:
        """The pending rows, where the kernel is to store them: it neither pads nor rotates rows, nor converts them."""
        new, sig = pending.sides, self.plan.signature
        fits = self._stores_new_rows and not stack.format.rotated and stack.dim == sig.key_dim
        return new if fits and new is not None and new[0].dtype == sig.dtype else None

    def _launch_over(self, count: int, stacked: bool) -> dict[str, object]:
        """Arguments of a launch over ``count`` keys, which are mostly those of the layer before."""
        latest = self._latest
        if latest[0] != count or latest[1] != stacked:
            latest = self._latest = (count, stacked, self._launch(self.plan.splits(count), stacked))
        return latest[2]

    def _launch(self, splits: int, stacked: bool) -> dict[str, object]:
        """Arguments of a launch that depend on the number of splits, and how keys and values come, alone."""
        launch = self._launches.get((splits, stacked))
        if launch is None:
            plan, sig = self.plan, self.plan.signature
            partial_rows = self._tiles * splits * plan.rows if splits > 1 else 0
            outputs = [
                ((sig.batch, sig.query_heads, sig.query_length, sig.value_dim), sig.dtype),
                ((max(1, partial_rows * (sig.value_dim + 2)),), mx.float32),
                ((1,), mx.uint32),
            ][: len(decode_outputs(sig, stacked))]
            launch = self._launches[splits, stacked] = {
                "grid": (plan.threads * splits, self._row_tiles, sig.batch),
                "threadgroup": (plan.threads, 1, 1),
                "output_dtypes": [dtype for _, dtype in outputs],
                "output_shapes": [shape for shape, _ in outputs],
            }
        return launch

    def _variant(self, call: AttentionCall, stacked: bool) -> CustomKernel:
        """The kernel for what a signature leaves open: the dtypes of mask and sinks, and how keys and values come."""
        mask, sinks = call.mask, call.sinks
        key = (mask.dtype if isinstance(mask, mx.array) else None, None if sinks is None else sinks.dtype, stacked)
        kernel = self._variants.get(key)
        if kernel is None:
            plan = self.plan
            mask_type, sink_type = (cuda_type(dtype or mx.float32) for dtype in key[:2])
            kernel = self._variants[key] = custom_kernel(
                _NAME,
                decode_inputs(plan.signature, stacked),
                decode_outputs(plan.signature, stacked),
                decode_body(_NAME, plan, mask_type, sink_type, stacked=stacked),
                prologue(_NAME, plan.threads, WIDE_HEADERS if isinstance(plan, WidePlan) else DECODE_HEADERS),
                plan.shared_bytes,
            )
        return kernel


@cache
def _no_rows(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Keys and values ``[1, 1, 0, 1]`` in the place of new ones."""
    nothing = mx.zeros((1, 1, 0, 1), dtype)
    return nothing, nothing


def _others(call: AttentionCall) -> list[mx.array]:
    """The operands that not all calls have."""
    others = [call.mask] if isinstance(call.mask, mx.array) else []
    if call.sinks is not None:
        others.append(call.sinks)
    if call.rope is not None:
        others += (call.rope.queries, call.rope.keys)
    return others


@dataclass(frozen=True)
class DecodeByLength:
    """Two kernels for calls of one signature: the one for contexts of ``fewest_keys`` and more, and the other."""

    short: DecodeKernel
    long: DecodeKernel
    fewest_keys: int

    def __call__(self, call: AttentionCall) -> mx.array:
        """Attention ``[B, Hq, L, Dv]`` of ``call``, lazy."""
        return (self.long if call.key_count >= self.fewest_keys else self.short)(call)
