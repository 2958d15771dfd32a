"""``metal_kernel`` with the call shape of ``mx.fast.metal_kernel``, which runs the kernel at once, in the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tests.metal.emulator import worker_process
from tests.metal.emulator.compiler import build, build_counting
from tests.metal.emulator.errors import MetalError
from tests.metal.emulator.signature import Input, function_name, generate, shape_arguments, template_values
from tests.metal.emulator.worker_process import ATOMIC, CHECK_RACES, WRITABLE, Argument, Cost

__all__ = ["Emulator"]

MAX_BUFFERS = 31
"""Of a kernel, on every device."""


class Emulator:
    """Makes kernels that run in the emulator, and keeps what each launch cost, in order, in ``costs``.

    With ``count_instructions`` it counts those instead of checking memory.

    The emulator is eager: functions that call its kernels cannot be compiled with ``mx.compile``.
    """

    def __init__(self, flags: int = CHECK_RACES, *, count_instructions: bool = False) -> None:
        self.costs: list[Cost] = []
        self._flags = flags
        self._count_instructions = count_instructions

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
    ) -> Callable[..., list[mx.array]]:
        """As :func:`mlx.core.fast.metal_kernel`."""
        if not output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")

        def call(
            *,
            inputs: Sequence[Any],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            template: Sequence[Any] | None = None,
            init_value: float | None = None,
            verbose: bool = False,
            stream: Any = None,
        ) -> list[mx.array]:
            _check_count("inputs", inputs, input_names)
            _check_count("output_shapes", output_shapes, output_names)
            _check_count("output_dtypes", output_dtypes, output_names)
            template = list(template or [])
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            if ensure_row_contiguous:
                arrays = [mx.contiguous(x) for x in arrays]
            mx.eval(arrays)
            described = [Input(n, a.dtype, a.ndim, a.size) for n, a in zip(input_names, arrays)]
            function = function_name(name, template, described, output_dtypes)
            outputs = list(zip(output_names, output_dtypes))
            text = generate(function, header, source, described, outputs, template, atomic_outputs)
            if verbose:
                print(f"Generated source code for `{name}`:\n```\n{text}\n```")
            if not text.isascii():
                raise MetalError("MLX hands a source to Metal's compiler as ASCII, which this is not")
            blocks: list[dict[str, int]] = []
            if self._count_instructions:
                library, blocks = build_counting(text, function, template_values(template))
            else:
                library = build(text, function, template_values(template))
            arguments = _input_arguments(described, arrays, source)
            for output, shape, dtype in zip(output_names, output_shapes, output_dtypes):
                initial = None if init_value is None else _bytes(mx.full(tuple(shape), init_value, dtype))
                size = int(np.prod(shape)) * dtype.size
                access = ATOMIC if atomic_outputs else WRITABLE
                arguments.append(Argument(len(arguments), output, size, initial, access))
            if len(arguments) > MAX_BUFFERS:
                raise MetalError(f"{len(arguments)} buffers, where Metal has {MAX_BUFFERS}")
            results, cost = worker_process.run(name, library, arguments, grid, threadgroup, self._flags, blocks)
            self.costs.append(cost)
            return [_array(r, tuple(s), d) for r, s, d in zip(results, output_shapes, output_dtypes)]

        return call


def _check_count(what: str, given: Sequence[Any], names: Sequence[str]) -> None:
    if len(given) != len(names):
        raise ValueError(f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(given)}.")


def _input_arguments(described: Sequence[Input], arrays: Sequence[mx.array], body: str) -> list[Argument]:
    """Every input as it lies in memory, with its strides, and the shapes and strides that the kernel asks for."""
    arguments: list[Argument] = []
    for x, array in zip(described, arrays):
        view = _view(array)
        data, inside = _memory_of(view)
        arguments.append(Argument(len(arguments), x.name, len(data), data, inside=inside))
        values: dict[str, NDArray[Any]] = {
            "_shape": np.array(view.shape, np.int32),
            "_strides": np.array([s // view.itemsize for s in view.strides], np.int64),
            "_ndim": np.array(view.ndim, np.int32),
        }
        for suffix in shape_arguments(x, body):
            content = values[suffix].tobytes()
            arguments.append(Argument(len(arguments), x.name + suffix, len(content), content))
    return arguments


def _view(array: mx.array) -> NDArray[Any]:
    """``array``'s own memory, with its strides, as NumPy sees it (bfloat16 as uint16)."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
        mx.eval(array)
    return np.array(array, copy=False)


def _memory_of(view: NDArray[Any]) -> tuple[bytes, bytes | None]:
    """The bytes from the first element of ``view`` to its last, and which of them belong to it (None: all)."""
    if view.flags.c_contiguous:
        return view.tobytes(), None
    if any(stride < 0 for stride in view.strides):
        raise NotImplementedError("negative strides")
    extent = sum((n - 1) * s for n, s in zip(view.shape, view.strides)) + view.itemsize
    raw = ctypes.string_at(view.ctypes.data, extent)
    inside = np.zeros(extent, np.uint8)
    np.lib.stride_tricks.as_strided(inside, (*view.shape, view.itemsize), (*view.strides, 1))[...] = 1
    return raw, inside.tobytes()


def _bytes(array: mx.array) -> bytes:
    mx.eval(array)
    return _view(array).tobytes()


def _array(data: bytes, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    raw = mx.array(np.frombuffer(data, np.uint8))
    return raw.view(dtype).reshape(shape)
