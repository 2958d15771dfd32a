"""What the launch plans need to know of the CUDA device: asked from the driver, since MLX does not say."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

__all__ = ["DeviceLimits", "device_limits"]

_MULTIPROCESSORS = 16
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76
_SHARED_MEMORY_PER_MULTIPROCESSOR = 81
_SHARED_MEMORY_PER_BLOCK = 97
"""CUdevice_attribute numbers of the driver's API."""


@dataclass(frozen=True)
class DeviceLimits:
    """Of one device. Shared memory is in bytes."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_per_multiprocessor: int
    shared_per_block: int


HOPPER = DeviceLimits((9, 0), 132, 228 * 1024, 227 * 1024)
"""An H100 or H200, for plans made without a device."""


@cache
def device_limits() -> DeviceLimits | None:
    """Of the first CUDA device, or ``None`` where the driver finds none."""
    driver = _driver()
    if driver is None:
        return None
    device = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return DeviceLimits(
        (attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR)),
        attribute(_MULTIPROCESSORS),
        attribute(_SHARED_MEMORY_PER_MULTIPROCESSOR),
        attribute(_SHARED_MEMORY_PER_BLOCK),
    )


def _driver() -> ctypes.CDLL | None:
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
