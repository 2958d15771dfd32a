"""The least time that the device would need: reading the keys and values once, and the multiply-adds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qsdpa_patch.bench.machine import device_memory
from qsdpa_patch.kernels.backends import load_backend

__all__ = ["DeviceLimits", "Work", "measure_device_limits"]

_LARGEST_ARRAY = {mx.DeviceType.cpu: 256 << 20, mx.DeviceType.gpu: 4 << 30}


@dataclass(frozen=True)
class Work:
    """What a call cannot do without.

    nbytes: of keys and values, in the form that they are kept in.
    multiply_adds: of queries with keys and of probabilities with values.
    """

    nbytes: int
    multiply_adds: int


@dataclass(frozen=True)
class DeviceLimits:
    """Rates of the device, measured in this run.

    bytes_per_second: of memory.
    multiply_adds_per_second: in float32; ``None`` where it is not measured (on GPUs).
    threads: that they were measured on; ``None`` where MLX's own operations were measured.
    """

    bytes_per_second: float
    multiply_adds_per_second: float | None = None
    threads: int | None = None

    def seconds(self, work: Work) -> float:
        """The least time for ``work``: that of the nearer limit."""
        reading = work.nbytes / self.bytes_per_second
        rate = self.multiply_adds_per_second
        return reading if rate is None else max(reading, work.multiply_adds / rate)

    def or_better(self, other: DeviceLimits) -> DeviceLimits:
        """The better rates of two measurements of one device: what else runs there can only slow it down."""
        rates = (self.multiply_adds_per_second, other.multiply_adds_per_second)
        return DeviceLimits(
            max(self.bytes_per_second, other.bytes_per_second),
            None if rates[0] is None or rates[1] is None else max(rates[0], rates[1]),
            self.threads,
        )

    def __str__(self) -> str:
        gigabytes = f"{self.bytes_per_second / 1e9:.{0 if self.bytes_per_second > 1e11 else 1}f} GB/s"
        if self.multiply_adds_per_second is None:
            return f"large copies and sums go at up to {gigabytes}"
        rate = f"{self.multiply_adds_per_second / 1e9:.0f} G multiply-adds/s"
        return f"{self.threads} threads read {gigabytes} and do {rate} in float32"


def measure_device_limits() -> DeviceLimits:
    """Measure the default device: large copies and sums on a GPU; reading and multiply-adds on all cores on the CPU."""
    if mx.default_device().type == mx.DeviceType.cpu and load_backend("cpu").is_available()[0]:
        from qsdpa_patch.kernels.cpu.limits import measure_limits  # needs the compiled library

        cpu = measure_limits()
        return DeviceLimits(cpu.read_bandwidth, cpu.multiply_add_rate, cpu.threads)
    return DeviceLimits(_bandwidth())


def _bandwidth(repeats: int = 7) -> float:
    """Bytes per second of memory, through MLX: the better of a large elementwise operation, which reads and writes,
    and a large sum, which reads. The median of several runs of each.
    """
    x = mx.zeros(_measured_bytes() // 4, mx.float32)
    mx.eval(x)
    calls = 1 if mx.default_device().type == mx.DeviceType.cpu else 10

    def negate() -> mx.array:
        y = x
        for _ in range(calls):
            y = -y
        return y

    def add_up() -> list[mx.array]:
        return [x.sum() for _ in range(calls)]

    copying = 2 * x.nbytes * calls / _median_seconds(negate, repeats)
    reading = x.nbytes * calls / _median_seconds(add_up, repeats)
    mx.clear_cache()
    return max(copying, reading)


def _median_seconds(make: Callable[[], Any], repeats: int) -> float:
    mx.eval(make())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(make())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _measured_bytes() -> int:
    """More than any cache holds, and a small part of the memory."""
    return min(_LARGEST_ARRAY[mx.default_device().type], (device_memory() or 16 << 30) // 16)
