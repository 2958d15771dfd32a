"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import mlx.core as mx

import qsdpa_patch

__all__ = ["describe_machine", "device_memory"]


def device_memory() -> int | None:
    """Bytes of the default device's memory; ``None`` where MLX does not say (on a CPU)."""
    info = mx.device_info()
    size = info.get("memory_size") or info.get("total_memory")  # on Metal, on CUDA
    return None if size is None else int(size)


def describe_machine() -> dict[str, Any]:
    """Device, processor and versions. ``memory_bytes``: :func:`device_memory`."""
    device = mx.default_device()
    info = mx.device_info()
    return {
        "device": device.type.name,
        "device_name": info.get("device_name", "unknown"),
        "architecture": info.get("architecture", platform.machine()),
        "memory_bytes": device_memory(),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"qsdpa-patch": qsdpa_patch.__version__, "mlx": version("mlx"), "mlx-lm": version("mlx-lm")},
    }
