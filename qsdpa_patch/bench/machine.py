"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib.metadata import version
from typing import Any

import mlx.core as mx

import qsdpa_patch

__all__ = ["copy_bandwidth", "describe_machine"]

_LARGEST_COPY = {mx.DeviceType.cpu: 256 << 20, mx.DeviceType.gpu: 4 << 30}


def describe_machine() -> dict[str, Any]:
    """Device, processor and versions."""
    device = mx.default_device()
    info = mx.device_info()
    return {
        "device": device.type.name,
        "device_name": info.get("device_name", "unknown"),
        "architecture": info.get("architecture", platform.machine()),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"qsdpa-patch": qsdpa_patch.__version__, "mlx": version("mlx"), "mlx-lm": version("mlx-lm")},
    }


def copy_bandwidth(repeats: int = 7) -> float:
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
