"""Which kernel stores the rows that are new in a cache: the one that attends to them, or one of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.attention_call import AttentionCall, check_call
from qsdpa_patch.kernels.cuda import decode
from qsdpa_patch.kernels.cuda.decode import DecodeKernel
from qsdpa_patch.kernels.cuda.decode_plan import decode_plan
from qsdpa_patch.kernels.cuda.device import HOPPER
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.pending_rows import PendingRows
from qsdpa_patch.kernels.quantized_tensor import PackedStack
from qsdpa_patch.kernels.row_quantization import quantize_rows_in_ops

FOUR = Format.affine(4)
Inputs = dict[str, mx.array]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """Puts a recorder in the place of the compiled kernels, and gives the inputs of each launch."""
    recorded: list[Inputs] = []

    def custom_kernel(name: str, inputs: list[str], *_: Any) -> Callable[..., list[mx.array]]:
        def launch(inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            recorded.append(dict(zip(names, inputs, strict=True)))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        names = inputs
        return launch

    monkeypatch.setattr(decode, "custom_kernel", custom_kernel)
    return recorded


class Stack:
    """Ten rows of a cache, the last two of them new."""

    def __init__(self, format: Format, dim: int, dtype: mx.Dtype = mx.float16) -> None:
        self.token, self.after, self.written = mx.zeros((1,), mx.uint32), mx.ones((1,), mx.uint32), 0
        fitted = format.fit(dim)[0]
        self.sides = [mx.random.normal((1, 2, 2, dim)).astype(dtype) for _ in range(2)]
        rows = [mx.concatenate([x] * 6, axis=2) for x in self.sides]
        buffers = quantize_rows_in_ops(rows, fitted)
        self.pending = PendingRows(self.sides, self._write, buffers, 10, self.after)
        self.stack = PackedStack(buffers[0], buffers[1], 2, fitted, dim=dim, dtype=dtype, rows=10, pending=self.pending)

    def _write(self, *_: Any) -> mx.array:
        self.written += 1
        return self.token

    def call(self) -> AttentionCall:
        queries = mx.zeros((1, 8, 2, self.stack.dim), self.sides[0].dtype)
        keys, values = self.stack.members()
        return check_call(queries, keys, values, scale=1.0, mask="causal")


def kernel_of(call: AttentionCall) -> DecodeKernel:
    return DecodeKernel(decode_plan(call.signature, HOPPER))


def test_the_kernel_that_attends_stores_them(launches: list[Inputs]) -> None:
    stack = Stack(FOUR, 64)
    call = stack.call()
    kernel = kernel_of(call)
    assert kernel(call).shape == (1, 8, 2, 64)
    (inputs,) = launches
    assert inputs["new_keys"] is stack.sides[0]
    assert inputs["new_values"] is stack.sides[1]
    assert inputs["written"] is stack.after
    assert inputs["codes"] is stack.stack.buffers[0]
    assert inputs["scale"].shape == (10,)
    assert (stack.pending.sides, stack.pending.after, stack.written) == (None, None, 0)


def test_a_second_call_waits_for_the_first(launches: list[Inputs]) -> None:
    stack = Stack(FOUR, 64)
    call = stack.call()
    kernel = kernel_of(call)
    kernel(call)
    kernel(call)
    assert launches[1]["new_keys"].size == launches[1]["new_values"].size == 0
    assert launches[1]["written"] is stack.pending.token
    assert launches[1]["written"] is not launches[1]["tickets"]
    assert stack.written == 0


def test_rows_that_are_stored_already(launches: list[Inputs]) -> None:
    stack = Stack(FOUR, 64)
    stack.stack.pending = None
    call = stack.call()
    kernel_of(call)(call)
    assert launches[0]["new_keys"].size == 0
    assert launches[0]["written"] is launches[0]["tickets"]


@pytest.mark.parametrize(
    ("format", "dim"),
    [(Format.affine(4, 32, rotated=True), 64), (FOUR, 72)],
    ids=["rotated", "padded"],
)
def test_a_kernel_of_its_own_stores_what_must_be_changed_first(
    launches: list[Inputs], format: Format, dim: int
) -> None:
    stack = Stack(format, dim)
    call = stack.call()
    kernel_of(call)(call)
    assert stack.written == 1
    assert launches[0]["written"] is stack.token
    assert launches[0]["new_keys"].size == 0


def test_operations_that_need_the_rows_have_them_stored(launches: list[Inputs]) -> None:
    stack = Stack(FOUR, 64)
    assert stack.stack.codes.shape[2] == stack.stack.scales.shape[2] == 10
    assert (stack.written, stack.pending.awaited) == (1, True)
    call = stack.call()
    kernel_of(call)(call)
    assert stack.written == 1
    assert launches[0]["written"] is stack.token
