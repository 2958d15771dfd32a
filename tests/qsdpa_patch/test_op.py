"""The op itself: ``quantized_scaled_dot_product_attention`` and ``quantize``, and what they refuse."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qsdpa_patch
from qsdpa_patch import Format, QuantizedTensor, quantize, quantized_scaled_dot_product_attention
from tests import attention_cases as cases

Q = mx.zeros((2, 4, 3, 64))
K = quantize(mx.zeros((2, 2, 20, 64)), Format.affine(4))


@pytest.mark.parametrize("seed", range(200, 260))
def test_random_calls(seed: int) -> None:
    """By whatever route, with 1 to 70 query rows."""
    case = cases.random_case(seed, max_count=300, max_length=70)
    call = cases.build(case)
    out = quantized_scaled_dot_product_attention(
        call.queries, call.keys, call.values, scale=call.scale, mask=call.mask, sinks=call.sinks
    )
    assert out.dtype == case.dtype
    assert cases.relative_error(out, cases.expected(call)) <= cases.TOLERANCES[case.dtype], str(case)


@pytest.mark.parametrize("dim", [1, 40, 72, 80, 120])
@pytest.mark.parametrize("length", [1, 40])
def test_head_dims_that_fill_no_group(dim: int, length: int) -> None:
    x = [mx.random.normal((2, 2, 50, dim), key=mx.random.key(i)) for i in range(2)]
    keys, values = (quantize(a, Format.affine(8, 64)) for a in x)
    queries = mx.random.normal((2, 4, length, dim))
    out = quantized_scaled_dot_product_attention(queries, keys, values, scale=dim**-0.5, mask="causal")
    wanted = mx.fast.scaled_dot_product_attention(
        queries, mx.array(keys), mx.array(values), scale=dim**-0.5, mask="causal"
    )
    assert out.shape == wanted.shape
    assert mx.allclose(out, wanted, atol=1e-5)


def test_padding_leaves_the_range_of_the_last_group() -> None:
    x = 5 + 0.1 * mx.random.normal((1, 1, 10, 72))
    assert mx.abs(quantize(x, Format.affine(8, 64)) - x).max() < 0.01


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"queries": Q.astype(mx.int32)}, TypeError, "queries are mlx.core.int32"),
        ({"queries": Q[0]}, ValueError, r"queries have shape \(4, 3, 64\): give \[batch, heads, length, head_dim\]"),
        ({"queries": Q[:1]}, ValueError, r"keys have shape \(2, 2, 20, 64\): queries \(1, 4, 3, 64\) take"),
        ({"keys": Q}, TypeError, "keys are array: give a QuantizedTensor"),
        ({"values": quantize(mx.zeros((2, 2, 19, 64)), Format.affine(4))}, ValueError, "values have shape"),
        ({"mask": "sliding"}, ValueError, "mask='sliding': the only mask with a name is 'causal'"),
        ({"mask": mx.zeros((3, 20), mx.int32)}, TypeError, "mask is mlx.core.int32"),
        ({"mask": [True]}, TypeError, "mask is list"),
        ({"mask": mx.zeros((5, 1, 1, 1, 20))}, ValueError, "it must broadcast to"),
        ({"sinks": mx.zeros((3,))}, ValueError, r"sinks have shape \(3,\): give one for each query head, \(4,\)"),
        ({"sinks": mx.zeros((4,), mx.int32)}, TypeError, "sinks are mlx.core.int32"),
        ({"queries": mx.zeros((2, 4, 21, 64)), "mask": "causal"}, ValueError, "takes as many keys or more"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"queries": Q, "keys": K, "values": K, "scale": 1.0}
    with pytest.raises(error, match=message):
        quantized_scaled_dot_product_attention(**(good | arguments))


@pytest.mark.parametrize(
    ("x", "format", "error", "message"),
    [
        (mx.zeros((4, 64), mx.int32), Format.affine(4), TypeError, "x is mlx.core.int32"),
        (mx.zeros((64,)), Format.affine(4), ValueError, "two dimensions or more"),
        (mx.zeros((4, 64)), "mxfp5", ValueError, "format 'mxfp5' is unknown"),
        (mx.zeros((4, 64)), 4, TypeError, "format is int"),
    ],
)
def test_bad_quantize(x: mx.array, format: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(x, format)


def test_formats_that_mlx_does_not_have() -> None:
    with pytest.raises(ValueError, match="bits=7 is not supported"):
        Format.affine(7)
    with pytest.raises(ValueError, match="group_size=48 is not supported"):
        Format.affine(4, 48)
    with pytest.raises(ValueError, match="mxfp4 has bits=4, group_size=32"):
        Format("mxfp4", 8, 64)
    with pytest.raises(ValueError, match="mode='int4' is unknown"):
        Format("int4")


def test_parts_that_do_not_fit() -> None:
    codes, scales, biases = mx.quantize(mx.zeros((4, 64)), group_size=32, bits=4)
    with pytest.raises(ValueError, match="scales have shape"):
        QuantizedTensor(codes, scales, biases, Format.affine(4, 64))
    with pytest.raises(ValueError, match="biases are missing"):
        QuantizedTensor(codes, scales, None, Format.affine(4, 32))
    with pytest.raises(TypeError, match="codes are"):
        QuantizedTensor(codes.astype(mx.int32), scales, biases, Format.affine(4, 32))
    with pytest.raises(ValueError, match="dim=32 does not fit"):
        QuantizedTensor(codes, scales, biases, Format.affine(4, 32), dim=32)


def test_a_quantized_tensor_is_an_array() -> None:
    x = mx.random.normal((1, 2, 10, 64))
    packed = quantize(x, Format.affine(4))
    assert isinstance(packed, mx.array)
    assert type(packed + 0) is mx.array
    assert mx.array_equal(packed.swapaxes(1, 2)[0], mx.array(packed).swapaxes(1, 2)[0])
    assert packed.packed_nbytes * 3.5 < x.nbytes * 2
    assert repr(packed) == "QuantizedTensor(shape=(1, 2, 10, 64), format='4-bit g64', dtype=mlx.core.float32)"


def test_a_direct_call_is_in_the_report() -> None:
    quantized_scaled_dot_product_attention(Q, K, K, scale=1.0)
    (row,) = qsdpa_patch.report().rows
    assert (row.model_type, row.calls) == ("(direct)", 1)
