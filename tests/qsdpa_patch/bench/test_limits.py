"""What the device could do at best."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qsdpa_patch.bench import limits
from qsdpa_patch.bench.cases import Case
from qsdpa_patch.bench.limits import DeviceLimits, Work, measure_device_limits
from qsdpa_patch.kernels.backends import load_backend
from qsdpa_patch.kernels.format import Format


def test_the_nearer_limit_counts() -> None:
    device = DeviceLimits(100.0, 10.0, 2)
    assert device.seconds(Work(200, 5)) == 2.0
    assert device.seconds(Work(200, 50)) == 5.0
    assert DeviceLimits(100.0).seconds(Work(200, 50)) == 2.0


@pytest.mark.parametrize(("length", "context"), [(1, 10), (3, 10), (10, 10)])
def test_work_of_a_causal_call(length: int, context: int) -> None:
    case = Case("decode", 2, 6, 3, 64, 32, length, context, mx.float32, Format.affine(4), Format.affine(4))
    seen = sum(context - length + 1 + row for row in range(length))
    assert case.work(77) == Work(77, 2 * 6 * seen * (64 + 32))


def test_measured_with_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_LARGEST_ARRAY", dict.fromkeys(limits._LARGEST_ARRAY, 1 << 20))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    found = measure_device_limits()
    assert found.bytes_per_second > 0
    backend = load_backend("cpu")
    if backend.is_available()[0]:
        assert found.multiply_adds_per_second
    monkeypatch.setattr(backend, "is_available", lambda: (False, "no compiler"))
    copied = measure_device_limits()
    assert copied.bytes_per_second > 0
    assert copied.multiply_adds_per_second is None
    assert "copies" in str(copied)


def test_the_better_of_two_measurements() -> None:
    first, second = DeviceLimits(100.0, 10.0, 2), DeviceLimits(90.0, 11.0, 2)
    assert first.or_better(second) == second.or_better(first) == DeviceLimits(100.0, 11.0, 2)
    assert DeviceLimits(1.0).or_better(DeviceLimits(2.0)) == DeviceLimits(2.0)
