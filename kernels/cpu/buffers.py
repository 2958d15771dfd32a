"""Where an MLX array's numbers lie in memory, without a copy."""

from __future__ import annotations

import ctypes

import mlx.core as mx

__all__ = ["NO_VIEW", "strided_view"]


class _PyBuffer(ctypes.Structure):
    """CPython's ``Py_buffer``, whose layout is part of the stable ABI since Python 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    )


_STRIDES = 0x10 | 0x8  # PyBUF_STRIDES

_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None

NO_VIEW = (0, 0, 0, 0)
"""In place of the view of an array that is not there."""


def strided_view(array: mx.array) -> tuple[int, ...]:
    """Address of an evaluated array's first number, and the strides of its axes in bytes (0 for axes of size 1).

    Valid as long as the array lives: MLX never moves an evaluated array's buffer.
    """
    view = _PyBuffer()
    _get_buffer(array, view, _STRIDES)
    strides = view.strides[: view.ndim]
    shape = view.shape[: view.ndim]
    address = view.buf or 0
    _release_buffer(view)
    return (address, *(0 if n == 1 else s for n, s in zip(shape, strides)))
