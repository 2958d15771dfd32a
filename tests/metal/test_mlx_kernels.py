"""MLX's own attention and quantization kernels, from the installed wheel, run right in the emulator.

They are known to be right on Apple GPUs, so they vouch for the emulator.
"""

from __future__ import annotations

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.format import FLOAT_FORMATS, Format
from qsdpa_patch.kernels.rotation import rotate
from tests.metal import mlx_attention, mlx_quantization
from tests.metal.emulator import MetalError, missing_tools

pytestmark = pytest.mark.skipif(bool(missing_tools()), reason=missing_tools() or "the emulator runs here")
TOLERANCES = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("kernel", ["vector", "two passes", "two passes, shared keys"])
def test_sdpa_vector(kernel: str, dtype: mx.Dtype) -> None:
    problem = mlx_attention.Problem(dtype, dim=128, group=4, kv_heads=2, count=333)
    output, _ = mlx_attention.attend(problem, kernel)
    assert mx.abs(output - problem.expected()).max() <= TOLERANCES[dtype]


def test_a_barrier_taken_out_of_sdpa_vector_is_missed() -> None:
    problem = mlx_attention.Problem(mx.float32, dim=64, group=1, kv_heads=1, count=100)
    line = "    o[i] = sum_exp_score == 0 ? o[i] : (o[i] / sum_exp_score);\n"
    barrier = "    threadgroup_barrier(mem_flags::mem_threadgroup);"
    with pytest.raises(MetalError, match="race"):
        mlx_attention.attend(problem, "vector", replace=(line + barrier, line))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_affine_quantize_and_dequantize(bits: int, dtype: mx.Dtype) -> None:
    """The two kernels of quantized.h against ``mx.quantize`` and ``mx.dequantize``."""
    format = Format.affine(bits)
    x = mx.random.normal((4, 256), key=mx.random.key(bits)).astype(dtype)
    packed = mx.quantize(x, group_size=64, bits=bits)
    made = mlx_quantization.quantize(x, format)
    restored = mx.dequantize(*packed, group_size=64, bits=bits)
    if dtype == mx.float32:
        assert all(mx.array_equal(actual, wanted) for actual, wanted in zip(made, packed, strict=True))
    else:  # where a number lies between two codes, MLX's CPU and GPU kernels round 16-bit intermediates differently
        codes, scales, biases = made
        step = mx.abs(mx.dequantize(codes, scales, biases, group_size=64, bits=bits) - restored)
        assert step.max() <= 1.01 * mx.abs(packed[1]).max()
    actual = mlx_quantization.dequantize(packed, format, x)
    assert mx.allclose(actual, restored, rtol=0, atol=2e-3 if dtype == mx.float16 else 1e-6)


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_fp_quantize(name: str) -> None:
    """The kernel of fp_quantized.h against ``mx.quantize``, which on the CPU drops the sign of zeros."""
    format = Format.named(name)
    x = mx.random.normal((4, 256), key=mx.random.key(0))
    codes, scales = mlx_quantization.quantize(x, format)
    wanted = mx.quantize(x, mode=name)
    assert mx.array_equal(scales, wanted[1])
    assert mx.array_equal(mx.dequantize(codes, scales, mode=name), mx.dequantize(*wanted, mode=name))


@pytest.mark.parametrize("dim", [8, 64, 96, 256])
def test_hadamard(dim: int) -> None:
    """The kernel of hadamard.h against ``mx.hadamard_transform``."""
    x = mx.random.normal((4, dim), key=mx.random.key(0))
    assert mx.allclose(mlx_quantization.rotate(x), rotate(x), rtol=0, atol=1e-6)
