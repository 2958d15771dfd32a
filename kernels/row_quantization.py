"""Quantization of the new rows of a cache, keys and values together, as one pair of arrays.

A step of decoding quantizes a row or two per head. What that costs is the number of operations, not the numbers in
them: so both sides go into one array of codes and one of scales and biases, heads after heads, by one kernel, and take
two writes to be put into a cache that is laid out alike.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any, cast

import mlx.core as mx

from qsdpa_patch.kernels.backends import default_backend_name, load_backend
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.messages import first_error
from qsdpa_patch.kernels.quantized_tensor import quantize_parts, stack_parts
from qsdpa_patch.kernels.rotation import rotate
from qsdpa_patch.kernels.row_kernel import RowKernel, Rows, can_rotate, launch, thread_count

__all__ = [
    "bytes_apart", "check_rows", "has_row_kernel", "quantize_rows", "quantize_rows_in_ops", "row_quantizer",
    "sample_rows", "tried_out",
]  # fmt: skip

_log = logging.getLogger("qsdpa_patch")
_DTYPES = (mx.float16, mx.bfloat16, mx.float32)
_FEW = 16
"""Rows that are joined before they are quantized, which takes fewer operations; more are joined once they are small."""

_FEWEST = 8
"""Numbers of a side that a kernel takes: MLX passes fewer to a Metal kernel as constants, not as device memory."""

_Quantize = Callable[[list[mx.array]], list[mx.array]]


def quantize_rows(sides: list[mx.array], format: Format) -> list[mx.array]:
    """Quantize the rows of one array, or of two (keys and values), to the bits that ``mx.quantize`` gives.

    On a GPU by one kernel, where it takes the rows (:func:`has_row_kernel`), else in MLX's own operations.

    Args:
        sides: one or two arrays ``[B, H_i, L, D]`` of one dtype (float16, bfloat16 or float32), with any strides.
            They may differ in their heads alone.
        format: fitted to ``D`` (:meth:`Format.fit`).

    Returns:
        Codes ``[B, H, L, format.words(padded)]`` uint32, where ``H`` counts the heads of all sides, one side after the
        other, and ``padded`` is ``D`` rounded up to 32; and scales ``[B, H, L, format.groups(padded)]`` in the dtype of
        ``sides`` (uint8 unless ``format`` is affine), followed along the heads by as many biases where ``format`` has
        them. Neither has a gradient.

    Raises:
        TypeError, ValueError: when the sides do not fit each other or ``format``.
    """
    return row_quantizer(sides, format)(sides)


def row_quantizer(sides: Sequence[mx.array], format: Format) -> _Quantize:
    """:func:`quantize_rows` for ``format`` and sides of these shapes and dtypes, on the device that is the default now.

    Raises:
        TypeError, ValueError: as that does.
    """
    return _plan(format, _on_gpu(), *[x.dtype for x in sides], *[x.shape for x in sides])


def _on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def quantize_rows_in_ops(sides: Sequence[mx.array], format: Format) -> list[mx.array]:
    """:func:`quantize_rows` in MLX's own operations."""
    if len(sides) > 1 and sides[0].shape[2] > _FEW and all(x.size for x in sides):  # no copy of all the rows
        parts = [quantize_parts(x, format) for x in sides]
    else:
        x = mx.concatenate(list(sides), axis=1)
        if x.size == 0:  # which mx.quantize takes in some formats only
            return _no_rows(x, format)
        parts = [quantize_parts(x, format)]
    return stack_parts(parts)


def _no_rows(x: mx.array, format: Format) -> list[mx.array]:
    batch, heads, count, dim = x.shape
    padded = format.fit(dim)[1]
    codes = mx.zeros((batch, heads, count, format.words(padded)), mx.uint32)
    planes = heads * (2 if format.has_biases else 1)
    return [codes, mx.zeros((batch, planes, count, format.groups(padded)), x.dtype if format.is_affine else mx.uint8)]


@lru_cache(maxsize=1024)
def _plan(format: Format, on_gpu: bool, *described: mx.Dtype | tuple[int, ...]) -> _Quantize:
    """How sides of these dtypes, which come first, and shapes are quantized."""
    sides = len(described) // 2
    dtypes, shapes = cast(tuple[mx.Dtype, ...], described[:sides]), cast(tuple[tuple[int, ...], ...], described[sides:])
    check_rows(format, dtypes, shapes)
    batch, _, count, dim = shapes[0]
    heads = sum(shape[1] for shape in shapes)
    backend = default_backend_name() if on_gpu else "cpu"
    formats = _formats_of_kernels(format, dim) if min(map(math.prod, shapes)) >= _FEWEST else []
    for packed in formats:
        rows = Rows(packed, dtypes[0], dim, len(shapes))
        if thread_count(rows, batch, heads, count) < 1 << 31 and has_row_kernel(backend, rows)[0]:
            quantize = _prepared(_kernel(backend, rows), rows, batch, heads, count)
            return quantize if packed == format else partial(_rotated, quantize)
    return partial(quantize_rows_in_ops, format=format)


def _formats_of_kernels(format: Format, dim: int) -> list[Format]:
    """What a kernel may do of ``format``: all, or where rows are rotated, all but that."""
    if not format.rotated:
        return [format]
    return [format, format.packing] if can_rotate(dim) else [format.packing]


def check_rows(format: Format, dtypes: tuple[mx.Dtype, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    """Raise unless arrays of these dtypes and shapes can be quantized together as ``format``."""
    if not 1 <= len(shapes) <= 2:
        raise ValueError(f"{len(shapes)} arrays are given: rows of one array, or of keys and values, are quantized")
    if dtypes[0] not in _DTYPES:
        raise TypeError(f"rows of {dtypes[0]} cannot be quantized: give float16, bfloat16 or float32")
    for dtype, shape in zip(dtypes, shapes):
        if len(shape) != 4 or (shape[0], *shape[2:], dtype) != (shapes[0][0], *shapes[0][2:], dtypes[0]):
            given = " and ".join(f"{shape} {dtype}" for dtype, shape in zip(dtypes, shapes))
            raise ValueError(f"rows {given}: give [batch, heads, count, dim], alike but for their heads")
    dim = shapes[0][3]
    if format.fit(dim)[0] != format:
        raise ValueError(f"{format} does not fit rows of {dim} numbers: format.fit({dim}) says what does")


@cache
def has_row_kernel(backend: str, rows: Rows) -> tuple[bool, str]:
    """Whether the kernel of ``backend`` quantizes ``rows``, and if not, why.

    The first time it is compiled and held against MLX's own operations, bit for bit. A kernel that fails is logged,
    and not used.
    """
    if backend == "cpu":
        return False, "the CPU quantizes rows in MLX's own operations"
    if rows.format.symmetric:
        return False, "symmetric formats are quantized in MLX's own operations"
    return tried_out(backend, rows, "the kernel that quantizes rows", _bytes_wrong)


def tried_out(backend: str, rows: Rows, name: str, bytes_wrong: Callable[[str, Rows], int]) -> tuple[bool, str]:
    """Whether ``backend`` is available and its kernel gives the bytes of MLX's operations, and if not, why: logged."""
    available, reason = load_backend(backend).is_available()
    if not available:
        return False, reason
    problem = message = ""
    try:
        if wrong := bytes_wrong(backend, rows):
            problem = f"{name} is wrong on this device: {wrong} bytes differ"
    except (RuntimeError, ValueError) as error:
        problem, message = f"{name} failed on this device: ", str(error)
    if problem:
        _log.warning("qsdpa_patch: %s%s (%s)", problem, message, rows)
    return not problem, problem + first_error(message)


def _bytes_wrong(backend: str, rows: Rows) -> int:
    """Bytes of some rows that the kernel quantizes unlike MLX's operations."""
    sides = sample_rows(rows)
    batch, heads, count, _ = sides[0].shape
    actual = _prepared(_kernel(backend, rows), rows, batch, heads * len(sides), count)(sides)
    return bytes_apart(actual, quantize_rows_in_ops(sides, rows.format))


def sample_rows(rows: Rows) -> list[mx.array]:
    """Sides of few rows, not contiguous; among them rows of zeros, of one number, of small ones, and an outlier."""
    sides = []
    for side in range(rows.sides):
        x = mx.random.normal((2, 5, 3, rows.dim), key=mx.random.key(side))
        x = x * mx.array([1, 8, 0, 1e-3, 0])[:, None, None] + mx.array([0, 0, 0, 0, 1.5])[:, None, None]
        x[:, 1, :, rows.dim // 2] = -60
        sides.append(x.astype(rows.dtype).swapaxes(1, 2))
    return sides


def bytes_apart(actual: Sequence[mx.array], wanted: Sequence[mx.array]) -> int:
    return sum(int(mx.sum(a.view(mx.uint8) != w.view(mx.uint8))) for a, w in zip(actual, wanted))


@cache
def _kernel(backend: str, rows: Rows) -> RowKernel:
    module = importlib.import_module(f"qsdpa_patch.kernels.{backend}.row_quantization")
    return cast(RowKernel, module.row_kernel(rows))


def _prepared(kernel: RowKernel, rows: Rows, batch: int, heads: int, count: int) -> _Quantize:
    """``kernel`` for inputs of these sizes."""
    format, padded = rows.format, rows.padded
    planes = heads * (2 if format.has_biases else 1)
    arguments: dict[str, Any] = {
        **launch(thread_count(rows, batch, heads, count)),
        "output_shapes": [(batch, heads, count, format.words(padded)), (batch, planes, count, format.groups(padded))],
        "output_dtypes": [mx.uint32, rows.dtype if format.is_affine else mx.uint8],
    }
    return lambda sides: kernel(inputs=sides, **arguments)


def _rotated(quantize: _Quantize, sides: list[mx.array]) -> list[mx.array]:
    return quantize([rotate(x) for x in sides])
