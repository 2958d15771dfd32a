"""MLX's own kernels that rotate and quantize (from headers of the installed wheel), run in the emulator.

They are what ``mx.quantize``, ``mx.dequantize`` and ``mx.hadamard_transform`` launch on a Mac. On the CPU, MLX rounds
some 16-bit intermediates differently, and where a number lies between two codes takes the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.rotation import block_size
from tests.metal.emulator.compiler import build
from tests.metal.emulator.signature import TYPE_NAMES
from tests.metal.emulator.worker_process import WRITABLE, Argument, run

__all__ = ["dequantize", "quantize", "quantize_rows", "rotate"]

_HEADERS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
_AFFINE_SIZES = {3: 8, 5: 8, 6: 4}
"""Numbers that a thread of ``affine_dequantize`` takes, where it is not as many as fill a byte."""


def quantize(x: mx.array, format: Format) -> list[mx.array]:
    """Codes, scales and, where ``format`` has them, biases of contiguous rows ``[..., dim]``."""
    *leading, dim = x.shape
    groups = (*leading, format.groups(dim))
    outputs = {"out": mx.zeros((*leading, format.words(dim)), mx.uint32)}
    if not format.is_affine:
        inputs = {"w": x}
        outputs["scales"] = mx.zeros(groups, mx.uint8)
        return _run("fp_quantize", x.dtype, format, inputs, outputs, x.size)
    outputs |= {name: mx.zeros(groups, x.dtype) for name in ("scales", "biases")}
    return _run("affine_quantize", x.dtype, format, {"w": x}, outputs, x.size // (format.group_size // 32))


def quantize_rows(sides: Sequence[mx.array], format: Format) -> tuple[mx.array, mx.array]:
    """:func:`qsdpa_patch.kernels.row_quantization.quantize_rows` by these kernels."""
    x = mx.concatenate(list(sides), axis=1)
    if format.rotated:
        x = rotate(x)
    added = format.fit(x.shape[-1])[1] - x.shape[-1]
    codes, *others = quantize(mx.concatenate([x, *[x[..., -1:]] * added], axis=-1), format)
    return codes, mx.concatenate(others, axis=1)


def rotate(x: mx.array) -> mx.array:
    """:func:`qsdpa_patch.kernels.rotation.rotate` by ``hadamard_n``."""
    block = block_size(x.shape[-1])
    radix = min(block, 16)
    source = (_HEADERS / "hadamard.h").read_text()
    source = source[: source.index("template <typename T, int N, int M")]
    source = source.replace("float& scale,", "float& scale [[buffer(2)]],")  # which Metal concludes from its place
    template = [("T", TYPE_NAMES[x.dtype]), ("N", str(block)), ("max_radix", str(radix)), ("read_width", "4")]
    arguments = [
        Argument(0, "in", x.nbytes, _bytes(x)),
        Argument(1, "out", x.nbytes, None, WRITABLE),
        Argument(2, "scale", 4, np.float32(block**-0.5).tobytes()),
    ]
    threads = block // radix
    library = build(source, "hadamard_n", template)
    outputs, _ = run("hadamard_n", library, arguments, (threads, x.size // block, 1), (threads, 1, 1))
    return _array(outputs[0], x)


def dequantize(parts: Sequence[mx.array], format: Format, like: mx.array) -> mx.array:
    """The values of packed rows of an affine ``format``, in the shape and dtype of ``like``."""
    inputs = dict(zip(("w", "scales", "biases"), parts))
    per_thread = _AFFINE_SIZES.get(format.bits, 8 // format.bits)
    return _run("affine_dequantize", like.dtype, format, inputs, {"out": like}, like.size // per_thread)[0]


def _run(
    kernel: str, dtype: mx.Dtype, format: Format, inputs: dict[str, mx.array], like: dict[str, mx.array], threads: int
) -> list[mx.array]:
    """Run ``kernel``; its outputs have the shapes and dtypes of ``like``."""
    template = [("T", TYPE_NAMES[dtype]), ("group_size", str(format.group_size)), ("bits", str(format.bits))]
    template.append(("has_global_scale", "false"))
    library = build(_source(format.is_affine), kernel, template)
    arguments: list[Argument] = []
    for name, array in inputs.items():
        data = _bytes(array)
        arguments.append(Argument(len(arguments), name, len(data), data))
    for name, array in like.items():
        arguments.append(Argument(len(arguments), name, array.nbytes, None, WRITABLE))
    if not format.is_affine:
        arguments.append(Argument(len(arguments), "global_scale", 4, bytes(4)))
    outputs, _ = run(kernel, library, arguments, (threads, 1, 1), (64, 1, 1))
    return [_array(data, a) for data, a in zip(outputs, like.values())]


def _bytes(x: mx.array) -> bytes:
    return np.array(x.reshape(-1).view(mx.uint8)).tobytes()


def _array(data: bytes, like: mx.array) -> mx.array:
    return mx.array(np.frombuffer(data, np.uint8)).view(like.dtype).reshape(like.shape)


@cache
def _source(affine: bool) -> str:
    """The kernels that quantize and dequantize, and the helpers before them, without the matrix products between."""
    source = (_HEADERS / ("quantized.h" if affine else "fp_quantized.h")).read_text()
    first = "[[kernel]] void affine_quantize(" if affine else "[[kernel]] void fp_quantize("
    start = source.rindex("template <", 0, source.index(first))
    return source[: source.index("struct QuantizedBlockLoader")].rpartition("template <")[0] + source[start:]
