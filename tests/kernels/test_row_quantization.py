"""Rows of keys and values quantized together are, bit for bit, what ``mx.quantize`` makes of each."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.format import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_FORMATS, Format
from qsdpa_patch.kernels.quantized_tensor import quantize_parts
from qsdpa_patch.kernels.row_quantization import quantize_rows

FORMATS = [
    *(Format.affine(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES),
    *map(Format.named, FLOAT_FORMATS),
]
UNUSUAL = [Format.affine(4, 32, symmetric=True), Format.affine(4, rotated=True), Format.named("mxfp8", rotated=True)]
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)


def apart(sides: list[mx.array], format: Format) -> tuple[mx.array, mx.array]:
    """Codes, and scales followed by biases, of sides that are quantized one by one."""
    parts = [quantize_parts(mx.contiguous(x), format) for x in sides]
    codes, *others = (mx.concatenate(list(part), axis=1) for part in zip(*parts, strict=True))
    return codes, mx.concatenate(others, axis=1)


def assert_same(actual: Sequence[mx.array], wanted: Sequence[mx.array]) -> None:
    for a, w in zip(actual, wanted, strict=True):
        assert (a.shape, a.dtype) == (w.shape, w.dtype)
        assert mx.array_equal(a, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS + UNUSUAL, ids=str)
def test_two_sides_are_quantized_as_each_alone(format: Format, dtype: mx.Dtype) -> None:
    keys, values = normal(2, 3, 5, 128, dtype=dtype), 3 * normal(2, 3, 5, 128, dtype=dtype) + 1
    actual = quantize_rows([keys, values], format)
    assert_same(actual, apart([keys, values], format))
    planes = 12 if format.has_biases else 6
    assert actual[0].shape == (2, 6, 5, format.words(128))
    assert actual[1].shape == (2, planes, 5, format.groups(128))
    assert actual[1].dtype == (dtype if format.is_affine else mx.uint8)


@pytest.mark.parametrize("format", [Format.affine(4), Format.affine(3, 32), Format.named("nvfp4")], ids=str)
def test_sides_of_any_layout(format: Format) -> None:
    projected = normal(2, 7, 8, 64, dtype=mx.float16)
    keys = projected[:, :, :3].swapaxes(1, 2)  # [B, L, H, D], as a projection gives it
    values = normal(2, 3, 64, 9, dtype=mx.float16).swapaxes(2, 3)[:, :, 1:8]  # numbers of a row lie apart
    assert_same(quantize_rows([keys, values], format), apart([keys, values], format))


@pytest.mark.parametrize("format", FORMATS[::5] + UNUSUAL, ids=str)
@pytest.mark.parametrize("heads", [(1,), (8,), (2, 5)], ids=str)
def test_one_side_and_sides_of_different_heads(format: Format, heads: tuple[int, ...]) -> None:
    sides = [normal(1, h, 1, 256) for h in heads]
    assert_same(quantize_rows(sides, format), apart(sides, format))


@pytest.mark.parametrize("dim", [72, 80, 96])
def test_rows_that_are_padded(dim: int) -> None:
    format, padded = Format.affine(4, 64).fit(dim)
    sides = [normal(1, 2, 3, dim), normal(1, 2, 3, dim) - 2]
    actual = quantize_rows(sides, format)
    assert_same(actual, apart(sides, format))
    assert actual[0].shape[-1] == format.words(padded)


@pytest.mark.parametrize("format", FORMATS[::7] + UNUSUAL, ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 1, 64), (1, 2, 0, 64), (1, 0, 3, 64)])
def test_no_rows_at_all(format: Format, shape: tuple[int, ...]) -> None:
    format, _ = format.fit(64)
    codes, scales = quantize_rows([mx.zeros(shape, mx.float16)] * 2, format)
    batch, heads, count, _ = shape
    assert codes.shape == (batch, 2 * heads, count, format.words(64))
    assert scales.shape == (batch, (4 if format.has_biases else 2) * heads, count, format.groups(64))
    assert scales.dtype == (mx.float16 if format.is_affine else mx.uint8)


def test_rows_that_do_not_fit_are_refused() -> None:
    x = mx.zeros((1, 2, 3, 64))
    four = Format.affine(4)
    with pytest.raises(ValueError, match="alike but for their heads"):
        quantize_rows([x, x[:, :, :2]], four)
    with pytest.raises(ValueError, match="alike but for their heads"):
        quantize_rows([x, x.astype(mx.float16)], four)
    with pytest.raises(ValueError, match=r"\[batch, heads, count, dim\]"):
        quantize_rows([x[0]], four)
    with pytest.raises(ValueError, match="3 arrays are given"):
        quantize_rows([x, x, x], four)
    with pytest.raises(TypeError, match="int32 cannot be quantized"):
        quantize_rows([x.astype(mx.int32)], four)
    with pytest.raises(ValueError, match="does not fit rows of 96 numbers"):
        quantize_rows([mx.zeros((1, 2, 3, 96))], four)
