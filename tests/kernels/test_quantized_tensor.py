"""A quantized tensor is an array."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, quantize

FORMATS = [Format.affine(4, 64), Format.affine(8, 32, symmetric=True), Format.named("mxfp4")]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_any_op_reads_the_values_and_gives_a_plain_array(format: Format) -> None:
    tensor = quantize(mx.random.normal((1, 2, 5, 80), key=mx.random.key(0)), format)
    values = tensor.dequantize()
    assert values.shape == tensor.shape == (1, 2, 5, 80)
    for out, expected in ((tensor * 2, values * 2), (tensor[:, 1], values[:, 1]), (mx.tanh(tensor), mx.tanh(values))):
        assert type(out) is mx.array
        assert mx.array_equal(out, expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_another_floating_point_dtype_leaves_it_packed(format: Format, dtype: mx.Dtype) -> None:
    tensor = quantize(mx.random.normal((1, 2, 5, 80), key=mx.random.key(0)).astype(mx.bfloat16), format)
    other = tensor.astype(dtype)
    assert type(other) is QuantizedTensor
    assert other.dtype == dtype
    assert other.codes is tensor.codes
    assert mx.allclose(other * 1, (tensor * 1).astype(dtype), rtol=0.02, atol=0.02)


def test_other_dtypes_decay() -> None:
    tensor = quantize(mx.full((1, 1, 2, 64), 3.0), FORMATS[0])
    assert type(tensor.astype(mx.int32)) is mx.array
    assert mx.array_equal(tensor.astype(mx.int32), mx.full((1, 1, 2, 64), 3))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_formats_reach_the_largest_number_of_a_group(bits: int, sign: int) -> None:
    """It gets the code that has no counterpart, whatever its sign."""
    x = mx.random.uniform(-1, 1, (1, 2, 5, 64), key=mx.random.key(bits))
    x[..., 10::32] = 2.0 * sign
    tensor = quantize(x, Format.affine(bits, 32, symmetric=True))
    values = tensor.dequantize()
    step = 2.0 / 2 ** (bits - 1)
    assert mx.allclose(values[..., 10::32], x[..., 10::32], atol=1e-6).item()
    assert float(mx.abs(values - x).max()) <= step / 2 + 1e-6


def test_a_symmetric_format_costs_little_more_than_one_with_biases() -> None:
    x = mx.random.normal((1, 4, 300, 128), key=mx.random.key(0))
    error, plain = (
        float(mx.square(quantize(x, Format.affine(4, 32, symmetric=symmetric)).dequantize() - x).mean())
        for symmetric in (True, False)
    )
    assert error < 1.2 * plain
