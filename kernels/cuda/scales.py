"""The softmax scale as the kernels take it: in device memory."""

from __future__ import annotations

import mlx.core as mx

from qsdpa_patch.kernels.cuda.tickets import start

__all__ = ["device_scale"]

_KEPT = 64
_COPIES = 64
_scales: dict[float, mx.array] = {}


def device_scale(scale: float) -> mx.array:
    """``scale`` in device memory: MLX keeps arrays of up to 8 bytes in the host's, which is slow to read."""
    array = _scales.get(scale)
    if array is None:
        if len(_scales) >= _KEPT:
            _scales.clear()
        array = _scales[scale] = mx.zeros((_COPIES,)) + scale
        start(array)
    return array
