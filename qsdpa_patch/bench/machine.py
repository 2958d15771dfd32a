"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx

__all__ = ["copy_bandwidth", "describe_machine"]

_COPIED_BYTES = {mx.DeviceType.cpu: 256 << 20, mx.DeviceType.gpu: 1 << 30}


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
        "versions": {name: _version(name) for name in ("qsdpa-patch", "mlx", "mlx-lm")},
    }


def copy_bandwidth(repeats: int = 7) -> float:
    """Bytes per second of an elementwise operation of MLX on one large array: every byte read and written once."""
    calls = 1 if mx.default_device().type == mx.DeviceType.cpu else 20
    x = mx.zeros(_COPIED_BYTES[mx.default_device().type] // 4, mx.float32)
    mx.eval(x)
    times = []
    for _ in range(repeats):
        y = x
        start = time.perf_counter()
        for _ in range(calls):
            y = -y
        mx.eval(y)
        times.append((time.perf_counter() - start) / calls)
    return 2 * x.nbytes / statistics.median(times)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
