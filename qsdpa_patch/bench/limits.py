"""The least time that the device would need: reading the keys and values once, and the multiply-adds."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import mlx.core as mx

from qsdpa_patch.kernels.backends import load_backend

__all__ = ["DeviceLimits", "Work", "measure_device_limits"]

_LARGEST_COPY = {mx.DeviceType.cpu: 256 << 20, mx.DeviceType.gpu: 4 << 30}


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
    threads: that they were measured on; ``None`` where the bytes are those of a copy, read and written.
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
            return f"a large copy reads and writes {gigabytes}"
        rate = f"{self.multiply_adds_per_second / 1e9:.0f} G multiply-adds/s"
        return f"{self.threads} threads read {gigabytes} and do {rate} in float32"


def measure_device_limits() -> DeviceLimits:
    """Measure the default device: a large copy on a GPU; reading and multiply-adds on all cores on the CPU."""
    if mx.default_device().type == mx.DeviceType.cpu and load_backend("cpu").is_available()[0]:
        from qsdpa_patch.kernels.cpu.limits import measure_limits  # needs the compiled library

        cpu = measure_limits()
        return DeviceLimits(cpu.read_bandwidth, cpu.multiply_add_rate, cpu.threads)
    return DeviceLimits(_copy_bandwidth())


def _copy_bandwidth(repeats: int = 7) -> float:
    """Bytes per second, read and written, of an elementwise operation of MLX from one large array to another."""
    x = mx.zeros(_copied_bytes() // 4, mx.float32)
    mx.eval(x, -x)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(-x)
        times.append(time.perf_counter() - start)
    mx.clear_cache()
    return 2 * x.nbytes / statistics.median(times)


def _copied_bytes() -> int:
    """More than any cache holds, and a small part of the memory."""
    info = mx.device_info()
    memory = int(info.get("total_memory") or info.get("memory_size") or 16 << 30)
    return min(_LARGEST_COPY[mx.default_device().type], memory // 16)
