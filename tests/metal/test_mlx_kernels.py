"""MLX's own attention and quantization kernels, from the installed wheel, run right in the emulator.

They are known to be right on Apple GPUs, so they vouch for the emulator.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.metal import mlx_attention
from tests.metal.emulator import MetalError, missing_tools
from tests.metal.emulator.compiler import build
from tests.metal.emulator.signature import TYPE_NAMES
from tests.metal.emulator.worker_process import WRITABLE, Argument, run

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
    x = mx.random.normal((4, 256), key=mx.random.key(bits)).astype(dtype)
    packed = mx.quantize(x, group_size=64, bits=bits)
    made = _run("affine_quantize", dtype, bits, {"w": x}, dict(zip(("out", "scales", "biases"), packed)), x.size // 2)
    restored = mx.dequantize(*packed, group_size=64, bits=bits)
    if dtype == mx.float32:
        assert all(mx.array_equal(actual, wanted) for actual, wanted in zip(made, packed))
    else:  # where a number lies between two codes, MLX's CPU and GPU kernels round 16-bit intermediates differently
        codes, scales, biases = made
        step = mx.abs(mx.dequantize(codes, scales, biases, group_size=64, bits=bits) - restored)
        assert step.max() <= 1.01 * mx.abs(packed[1]).max()
    inputs = dict(zip(("w", "scales", "biases"), packed))
    per_thread = {3: 8, 5: 8, 6: 4}.get(bits, 8 // bits)
    (actual,) = _run("affine_dequantize", dtype, bits, inputs, {"out": x}, x.size // per_thread)
    assert mx.allclose(actual, restored, rtol=0, atol=2e-3 if dtype == mx.float16 else 1e-6)


def _run(
    kernel: str, dtype: mx.Dtype, bits: int, inputs: dict[str, mx.array], like: dict[str, mx.array], threads: int
) -> list[mx.array]:
    """Run a kernel of quantized.h; its outputs have the shapes and dtypes of ``like``."""
    source = (Path(mx.__file__).parent / "include/mlx/backend/metal/kernels/quantized.h").read_text()
    template = "template <typename T, int group_size, int bits, bool has_global_scale = false>\n[[kernel]] void "
    helpers = source[: source.index("struct QuantizedBlockLoader")].rpartition("template <")[0]
    source = helpers + source[source.index(template + "affine_quantize") :]
    library = build(source, kernel, [("T", TYPE_NAMES[dtype]), ("group_size", "64"), ("bits", str(bits))])
    arguments = []
    for i, (name, array) in enumerate(inputs.items()):
        data = np.array(array).tobytes()
        arguments.append(Argument(i, name, len(data), data))
    for name, array in like.items():
        arguments.append(Argument(len(arguments), name, array.nbytes, None, WRITABLE))
    outputs, _ = run(kernel, library, arguments, (threads, 1, 1), (64, 1, 1))
    return [
        mx.array(np.frombuffer(data, np.uint8)).view(a.dtype).reshape(a.shape)
        for data, a in zip(outputs, like.values())
    ]
