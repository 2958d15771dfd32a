"""The CUDA kernel that quantizes new rows gives the bits of ``mx.quantize`` on the device."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.cuda import backend
from qsdpa_patch.kernels.format import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_FORMATS, Format
from qsdpa_patch.kernels.row_kernel import Rows
from qsdpa_patch.kernels.row_quantization import has_row_kernel, quantize_rows, quantize_rows_in_ops

_AVAILABLE, _REASON = backend.is_available()
pytestmark = pytest.mark.skipif(not _AVAILABLE, reason=_REASON)
FORMATS = [
    *(Format.affine(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES),
    *map(Format.named, FLOAT_FORMATS),
]
ROTATED = [Format.affine(4, 32, rotated=True), Format.named("mxfp8", rotated=True)]
SHAPE = (1, 4, 512, 128)


def _inputs(dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Rows of many kinds: what a model may give, and what it should not."""
    key = iter(mx.random.split(mx.random.key(1), 8))
    x = mx.random.normal(SHAPE, key=next(key))
    spread = mx.exp(6 * mx.random.normal((*SHAPE[:3], 1), key=next(key)))
    yield "normal", x
    yield "rows of different size", x * spread
    yield "outliers", x * mx.exp(3 * mx.random.normal(SHAPE, key=next(key)))
    yield "whole numbers", mx.round(3 * x)
    yield "halfway between codes", mx.round(mx.random.uniform(-16, 16, SHAPE, key=next(key))) / 4
    yield "negative", -mx.abs(x)
    yield "mostly zeros", mx.where(mx.abs(x) > 2, x, -0.0)
    bits = mx.random.randint(-(1 << 31), (1 << 31) - 1, SHAPE, key=next(key))
    yield "any bits", bits.view(dtype)[..., : SHAPE[-1]]  # denormal numbers, infinities and NaN among them


def _assert_bits_of_mlx(sides: list[mx.array], format: Format, name: str) -> None:
    assert has_row_kernel("cuda", Rows(format, sides[0].dtype, sides[0].shape[-1], len(sides))) == (True, "")
    for a, w in zip(quantize_rows(sides, format), quantize_rows_in_ops(sides, format), strict=True):
        assert (a.shape, a.dtype) == (w.shape, w.dtype), name
        assert mx.array_equal(a.view(mx.uint8), w.view(mx.uint8)), name


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("format", FORMATS + ROTATED, ids=str)
def test_every_format(format: Format, dtype: mx.Dtype) -> None:
    for name, x in _inputs(dtype):
        keys = x.astype(dtype)
        values = mx.contiguous(keys[:, ::-1].swapaxes(1, 2)).swapaxes(1, 2)
        _assert_bits_of_mlx([keys, values], format, name)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 256])
def test_rotated_rows_of_any_length(dim: int, dtype: mx.Dtype) -> None:
    x = mx.random.normal((2, 3, 100, dim), key=mx.random.key(dim)).astype(dtype)
    _assert_bits_of_mlx([x, x[:, ::-1]], ROTATED[0], f"rows of {dim}")


def test_any_layout() -> None:
    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=mx.random.key(0)).astype(mx.float16)

    four = Format.affine(4)
    rows = normal(2, 9, 6, 80).swapaxes(1, 2)
    for name, sides in {
        "numbers of a row apart": [normal(2, 3, 64, 9).swapaxes(2, 3)[:, :, 1:8]],
        "rows at odd places": [normal(1, 2, 5, 131)[..., 3:]],
        "heads that are one": [mx.broadcast_to(normal(1, 1, 5, 128), (2, 4, 5, 128))],
        "sides of different heads": [normal(2, 3, 5, 128), normal(2, 1, 5, 128)],
        "padded": [rows, rows[::-1]],
        "one row": [normal(1, 1, 1, 32)],
    }.items():
        _assert_bits_of_mlx(sides, four.fit(sides[0].shape[-1])[0], name)


def test_within_a_compiled_function() -> None:
    x = mx.random.normal((1, 8, 1, 128))
    format = Format.affine(4)
    compiled = mx.compile(lambda a, b: quantize_rows([a, b], format))
    assert all(map(mx.array_equal, compiled(x, x + 1), quantize_rows_in_ops([x, x + 1], format)))
