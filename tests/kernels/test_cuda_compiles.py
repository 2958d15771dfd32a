"""The CUDA kernels compile, where ``nvcc`` is: as MLX writes them out around our text, for devices old and new."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.cuda.decode import DecodeKernel
from qsdpa_patch.kernels.cuda.decode_plan import decode_plan
from qsdpa_patch.kernels.cuda.device import HOPPER, DeviceLimits
from qsdpa_patch.kernels.cuda.mla import MlaKernel
from qsdpa_patch.kernels.cuda.mla_plan import mla_plan
from qsdpa_patch.kernels.cuda.prefill import PrefillKernel
from qsdpa_patch.kernels.cuda.prefill_plan import prefill_plan
from qsdpa_patch.kernels.cuda.row_quantization import row_kernel
from qsdpa_patch.kernels.cuda.row_writing import row_writer, writing_kernel
from qsdpa_patch.kernels.cuda.wide_plan import wide_plan
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.row_kernel import OUTPUTS, Rows, launch
from qsdpa_patch.kernels.row_quantization import quantize_rows_in_ops
from tests.attention_cases import Case, build

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, which compiles CUDA, is not installed")

AMPERE = DeviceLimits((8, 0), 108, 164 * 1024, 163 * 1024)
ADA = DeviceLimits((8, 9), 128, 100 * 1024, 99 * 1024)
EIGHT, FOUR = Format.affine(8), Format.affine(4)
_TYPES = {
    mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float",
    mx.bool_: "bool", mx.uint8: "uint8_t", mx.uint32: "uint32_t",
}  # fmt: skip
_PRELUDE = """#include <cstdint>
#include <cuda/std/array>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 8>;
using Strides = cuda::std::array<int64_t, 8>;
}
"""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], list[str]]:
    """Puts a recorder in the place of ``mx.fast.cuda_kernel``; compiles what it has seen, and gives what ptxas says."""
    texts: list[str] = []

    def cuda_kernel(
        name: str, input_names: list[str], output_names: list[str], source: str, header: str, **_: Any
    ) -> Callable[..., list[mx.array]]:
        def launch(inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            signature = _signature(input_names, inputs, output_names, output_dtypes, source)
            opening = f"namespace mlx::core::cu {{\n__global__ void custom_kernel_{name}({signature}) {{\n"
            texts.append(f"{_PRELUDE}{header}{opening}{source}\n}}\n}}\n")
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    def run(architecture: str) -> list[str]:
        assert texts, "no kernel was launched"
        return [_compile(text, tmp_path / f"{i}.cu", architecture) for i, text in enumerate(texts)]

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    return run


def _signature(
    names: list[str], inputs: list[mx.array], outputs: list[str], dtypes: list[mx.Dtype], source: str
) -> str:
    """The parameters that MLX gives a kernel: shapes and strides only of inputs whose source names them."""
    parameters = []
    for name, x in zip(names, inputs, strict=True):
        parameters.append(f"const {_TYPES[x.dtype]}* {name}")
        if f"{name}_shape" in source:
            parameters.append(f"const __grid_constant__ Shape {name}_shape")
        if f"{name}_strides" in source:
            parameters.append(f"const __grid_constant__ Strides {name}_strides")
    parameters += [f"{_TYPES[dtype]}* {name}" for name, dtype in zip(outputs, dtypes, strict=True)]
    return ", ".join(parameters)


def _compile(text: str, path: Path, architecture: str) -> str:
    path.write_text(text)
    command = [
        "nvcc",
        "-std=c++20",
        f"-arch=sm_{architecture}",
        "-cubin",
        "-Xptxas",
        "-v",
        "-o",
        f"{path}bin",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning" not in done.stderr, done.stderr[-3000:]
    return done.stderr


def _spilled(messages: str) -> int:
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", messages)))


@pytest.mark.parametrize(
    ("limits", "architecture", "case"),
    [
        (AMPERE, "80", Case(seed=0, dtype=mx.bfloat16, group=4, key_dim=128, value_dim=128, stacked=True)),
        (ADA, "89", Case(seed=0, dtype=mx.float32, group=3, key_format=FOUR, value_format=EIGHT, sinks=True)),
        (HOPPER, "90a", Case(seed=0, dtype=mx.float16, group=4, key_dim=128, value_dim=128, stacked=True)),
        (HOPPER, "90a", Case(seed=0, dtype=mx.float16, group=4, key_dim=128, value_dim=128, length=4, mask="causal")),
        (HOPPER, "90a", Case(seed=0, dtype=mx.float16, group=16, key_dim=256, value_dim=256, mask="additive")),
    ],
    ids=lambda x: str(x) if isinstance(x, Case) else "",
)
def test_decoding(compiled: Callable[[str], list[str]], limits: DeviceLimits, architecture: str, case: Case) -> None:
    call = build(case)
    DecodeKernel(decode_plan(call.signature, limits))(call)
    (messages,) = compiled(architecture)
    assert case.mask == "additive" or _spilled(messages) == 0


@pytest.mark.parametrize(
    "case",
    [
        Case(
            seed=0, batch=2, dtype=mx.float16, group=4, length=8, key_dim=128, value_dim=128, mask="causal",
            stacked=True,
        ),
        Case(seed=0, kv_heads=8, dtype=mx.bfloat16, group=16, key_dim=256, value_dim=256, mask="additive", sinks=True),
        Case(
            seed=0, dtype=mx.bfloat16, group=5, length=7, key_dim=128, value_dim=256, mask="bool",
            key_format=Format.affine(2, symmetric=True), value_format=Format.affine(8, 128),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_decoding_some_query_rows(compiled: Callable[[str], list[str]], case: Case) -> None:
    call = build(case)
    DecodeKernel(wide_plan(call.signature, HOPPER))(call)
    (messages,) = compiled("90a")
    assert "serialized" not in messages  # by ptxas, where registers do not suffice for products under way


def test_absorbed_mla(compiled: Callable[[str], list[str]]) -> None:
    call = build(Case(seed=0, kv_heads=1, group=64, dtype=mx.float16, key_dim=512, value_dim=512, rope_dim=64))
    MlaKernel(mla_plan(call.signature, HOPPER))(call)
    messages, _ = compiled("90a")  # and of the merge of its splits
    assert "serialized" not in messages


@pytest.mark.parametrize(("key_dim", "value_dim"), [(256, 256), (192, 128)])
def test_many_query_rows(compiled: Callable[[str], list[str]], key_dim: int, value_dim: int) -> None:
    case = Case(seed=0, length=40, count=64, capacity=64, dtype=mx.bfloat16, key_dim=key_dim, value_dim=value_dim)
    call = build(case)
    PrefillKernel(prefill_plan(call.signature, HOPPER))(call)
    compiled("90a")


@pytest.mark.parametrize("format", [Format.affine(3), Format.affine(4, rotated=True), Format.named("nvfp4")], ids=str)
def test_quantizing_rows(compiled: Callable[[str], list[str]], format: Format) -> None:
    rows = mx.zeros((1, 2, 3, 128), mx.float16)
    kernel = row_kernel.__wrapped__(Rows(format, mx.float16, 128, 1))
    scales = mx.float16 if format.is_affine else mx.uint8
    kernel(inputs=[rows], output_shapes=[(1,)] * len(OUTPUTS), output_dtypes=[mx.uint32, scales])
    (messages,) = compiled("80")
    assert _spilled(messages) == 0


@pytest.mark.parametrize("format", [Format.affine(3), Format.affine(4, rotated=True), Format.named("nvfp4")], ids=str)
def test_writing_rows(compiled: Callable[[str], list[str]], format: Format) -> None:
    rows = [mx.zeros((1, 2, 3, 128), mx.float16)] * 2
    writing_kernel.cache_clear()
    write = row_writer(Rows(format, mx.float16, 128, 2), launch(192))
    write(rows, [mx.zeros_like(x) for x in quantize_rows_in_ops(rows, format)], 3, None)
    writing_kernel.cache_clear()
    (messages,) = compiled("80")
    assert _spilled(messages) == 0
