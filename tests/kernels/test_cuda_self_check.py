"""The check of a CUDA kernel at its first use, on stand-ins for kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from qsdpa_patch.kernels import reference
from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.cuda import self_check
from tests.attention_cases import Case, build

CASE = Case(seed=1)
COMPILER_SAYS = "Failed to compile kernel\ndecode.cuh(7): error: no such instruction\n1 error detected.\n"


@dataclass
class StandIn:
    """What the check uses of a kernel."""

    attend: Callable[[AttentionCall], mx.array]
    plan: Any
    source: str
    calls: int = 0

    def __call__(self, call: AttentionCall) -> mx.array:
        self.calls += 1
        return self.attend(call)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[StandIn, str]]:
    """A stand-in that attends so, and why it cannot be used."""
    monkeypatch.setattr(self_check, "_failures", {})

    def check(attend: Callable[[AttentionCall], mx.array], case: Case = CASE) -> tuple[StandIn, str]:
        kernel: Any = StandIn(attend, SimpleNamespace(signature=build(case).signature, keys_to_check=75), "text")
        return kernel, self_check.failure(kernel)

    return check


def one_number(value: float) -> Callable[[AttentionCall], mx.array]:
    """Attention with ``value`` in the place of its last number."""

    def attend(call: AttentionCall) -> mx.array:
        out = reference.attend(call).astype(mx.float32)
        last = mx.arange(out.size).reshape(out.shape) == out.size - 1
        return mx.where(last, value, out).astype(call.signature.dtype)

    return attend


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_a_kernel_that_agrees_with_the_reference_is_used(
    checked: Callable[..., tuple[StandIn, str]], dtype: mx.Dtype, mask: str
) -> None:
    case = Case(seed=1, dtype=dtype, length=4, mask=mask, sinks=True)
    assert checked(reference.attend, case)[1] == ""


@pytest.mark.parametrize("value", [9.0, mx.inf, mx.nan])
def test_one_wrong_number_is_enough(checked: Callable[..., tuple[StandIn, str]], value: float) -> None:
    assert checked(one_number(value))[1].startswith("the kernel is wrong on this device: error ")


def test_a_kernel_that_does_not_compile_is_tried_once_and_said_with_all_that_the_compiler_said(
    checked: Callable[..., tuple[StandIn, str]], caplog: pytest.LogCaptureFixture
) -> None:
    def attend(call: AttentionCall) -> mx.array:
        raise RuntimeError(COMPILER_SAYS)

    with caplog.at_level(logging.WARNING, "qsdpa_patch"):
        kernel, reason = checked(attend)
        again: Any = kernel
        assert self_check.failure(again) == reason
    assert reason == "the kernel failed on this device: decode.cuh(7): error: no such instruction"
    assert kernel.calls == 1
    (record,) = caplog.records
    assert COMPILER_SAYS in record.getMessage()
