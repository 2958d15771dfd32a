"""Tensors that share two arrays: what they read as, their parts, and which calls may take the arrays whole."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.attention_call import check_call
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import PackedStack, QuantizedTensor, quantize, stack_parts

FORMATS = [
    Format.affine(4),
    Format.affine(3, 32),
    Format.affine(8, 32, symmetric=True),
    Format.affine(4, rotated=True),
    Format.named("mxfp8"),
    Format.named("nvfp4"),
]


def stacked(tensors: list[QuantizedTensor], dim: int, dtype: mx.Dtype) -> PackedStack:
    codes, scales = stack_parts([tensor.parts for tensor in tensors])
    return PackedStack(codes, scales, len(tensors), tensors[0].format, dim=dim, dtype=dtype)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_its_tensors_are_those_it_was_made_of(format: Format, count: int, dim: int, dtype: mx.Dtype) -> None:
    shape = (2, 3, 5, dim)
    apart = [quantize(mx.random.normal(shape, key=mx.random.key(i)).astype(dtype), format) for i in range(count)]
    stack = stacked(apart, dim, dtype)
    stack.check()
    tensors = stack.tensors()
    assert len(tensors) == count
    for index, (tensor, wanted) in enumerate(zip(tensors, apart)):
        assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
        assert (tensor.format, tensor.dim, tensor.padded_dim, tensor.scale_dtype) == (
            wanted.format, wanted.dim, wanted.padded_dim, wanted.scale_dtype,
        )  # fmt: skip
        assert (tensor.stack, tensor.index) == (stack, index)
        assert mx.array_equal(tensor, wanted)
        assert mx.array_equal(tensor.dequantize(), wanted.dequantize())
        assert len(tensor.parts) == len(wanted.parts)
        assert all(mx.array_equal(part, other) for part, other in zip(tensor.parts, wanted.parts))
        assert (tensor.biases is None) == (not tensor.format.has_biases)
        assert tensor.packed_nbytes == wanted.packed_nbytes


def test_a_call_knows_the_stack_of_its_keys_and_values() -> None:
    x = mx.random.normal((1, 2, 7, 64), key=mx.random.key(0))
    keys, values = stacked([quantize(x, "mxfp4"), quantize(x + 1, "mxfp4")], 64, x.dtype).tensors()
    others = stacked([quantize(x, "mxfp4"), quantize(x + 1, "mxfp4")], 64, x.dtype).tensors()
    third = stacked([quantize(x, "mxfp4")] * 3, 64, x.dtype).tensors()

    def stack(keys: QuantizedTensor, values: QuantizedTensor) -> PackedStack | None:
        return check_call(x[:, :, :1], keys, values, scale=1.0).stack

    assert stack(keys, values) is keys.stack
    for swapped_or_apart in ((values, keys), (keys, keys), (keys, others[1]), tuple(third[:2])):
        assert stack(*swapped_or_apart) is None
    assert stack(quantize(x, "mxfp4"), values) is None


def test_arrays_that_are_no_stack_are_refused() -> None:
    codes, scales = mx.zeros((1, 4, 8, 16), mx.uint32), mx.zeros((1, 8, 8, 1))
    PackedStack(codes, scales, 2, Format.affine(8), dim=64, dtype=mx.float32).check()
    wrong = [
        (codes[0], scales[0], "have no heads"),
        (codes[:, :3], scales[:, :6], "2 tensors in 3 planes"),
        (codes, scales[:, :4], "4 of scales"),
        (codes, scales[:, :, :7], "scales have shape"),
        (codes[..., :8], scales, "words"),
    ]
    for bad_codes, bad_scales, message in wrong:
        with pytest.raises(ValueError, match=message):
            PackedStack(bad_codes, bad_scales, 2, Format.affine(8), dim=64, dtype=mx.float32).check()
    with pytest.raises(TypeError, match="codes are"):
        PackedStack(codes.astype(mx.int32), scales, 2, Format.affine(8), dim=64, dtype=mx.float32).check()
