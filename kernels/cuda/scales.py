"""The softmax scale as the kernels take it: in device memory."""

from __future__ import annotations

import threading

import mlx.core as mx

from qsdpa_patch.kernels.cuda.tickets import start

__all__ = ["device_scale", "repeated"]

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


class _Thread(threading.local):
    """A thread's latest arrays of :func:`repeated`, by the number."""

    def __init__(self) -> None:
        self.latest: dict[float, tuple[int, mx.array]] = {}


_thread = _Thread()


def repeated(number: float, count: int) -> mx.array:
    """``number`` in device memory, as an array ``[count]`` of strides 0.

    Kernels that get whole buffers of a cache learn from its length how many rows belong to it: a number would cost an
    array for each, and a slice of each buffer two. Mostly the layer before asked for the same.
    """
    latest = _thread.latest.get(number)
    if latest is None or latest[0] != count:
        if len(_thread.latest) >= _KEPT:
            _thread.latest.clear()
        latest = _thread.latest[number] = count, mx.broadcast_to(device_scale(number)[:1], (count,))
    return latest[1]
