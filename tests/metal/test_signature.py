"""The source that the emulator generates around a kernel is the one that MLX generates.

MLX without Metal still prints it, when a function that calls the kernel is exported.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests import attention_cases as cases
from tests.metal.emulated_backend import emulated_backend
from tests.metal.emulator import missing_tools
from tests.metal.emulator.signature import Input, function_name, generate

KERNELS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {
            "name": "attributes",
            "input_names": ["x", "n", "s", "u"],
            "output_names": ["y", "w"],
            "header": "// header\n",
            "source": "y[0] = x_shape[0] + x_strides[1] + x_ndim + n + s[0] + s_shape[0] + thread_position_in_grid.x + "
            "simdgroup_index_in_threadgroup + threads_per_simdgroup; n_shape; thread_index_in_quadgroup;",
        },
        {
            "inputs": [mx.zeros((3, 4)), mx.array(3), mx.zeros(7, mx.bfloat16), mx.zeros(8, mx.bool_)],
            "template": [("B", True), ("C", False), ("K", 7), ("T", mx.bfloat16)],
            "output_shapes": [(1,), (2,)],
            "output_dtypes": [mx.float32, mx.int8],
        },
    ),
    (
        {
            "name": "atomics",
            "input_names": ["x"],
            "output_names": ["y"],
            "source": "y[0] = x[0];",
            "atomic_outputs": True,
        },
        {"inputs": [mx.zeros(30)], "output_shapes": [(1,)], "output_dtypes": [mx.float32]},
    ),
    (
        {"name": "scalar", "input_names": ["x"], "output_names": ["y"], "source": "y[0] = x;"},
        {"inputs": [mx.array(2.5)], "output_shapes": [(1,)], "output_dtypes": [mx.float32]},
    ),
]


def generated_by_mlx(kernel: dict[str, Any], call: dict[str, Any]) -> str:
    function: Any = mx.fast.metal_kernel(**kernel)

    def traced(*inputs: mx.array) -> mx.array:
        out: mx.array = function(inputs=list(inputs), grid=(1, 1, 1), threadgroup=(1, 1, 1), verbose=True, **call)[0]
        return out

    call = dict(call)
    inputs = call.pop("inputs")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        saved = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(str(Path(folder) / "kernel.mlxfn"), traced, *inputs)
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(saved, 1)
            os.close(saved)
        printed.seek(0)
        text = printed.read().decode()
    return text.split("```\n")[1].split("\n```")[0].split("\ntemplate [[host_name")[0].rstrip("\n")


def generated_here(kernel: dict[str, Any], call: dict[str, Any]) -> str:
    inputs = [Input(n, x.dtype, x.ndim, x.size) for n, x in zip(kernel["input_names"], call["inputs"])]
    template = call.get("template", [])
    name = function_name(kernel["name"], template, inputs, call["output_dtypes"])
    outputs = list(zip(kernel["output_names"], call["output_dtypes"]))
    header, atomic = kernel.get("header", ""), kernel.get("atomic_outputs", False)
    return generate(name, header, kernel["source"], inputs, outputs, template, atomic).rstrip("\n")


@pytest.mark.parametrize("kernel", KERNELS, ids=[k["name"] for k, _ in KERNELS])
def test_signatures_are_those_of_mlx(kernel: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert generated_here(*kernel) == generated_by_mlx(*kernel)


@pytest.mark.skipif(mx.metal.is_available(), reason="the emulator stands in only where there is no Metal")
@pytest.mark.parametrize("seed", range(8))
def test_signatures_of_the_attention_kernels_are_those_of_mlx(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from qsdpa_patch.kernels.metal import backend

    if missing_tools():
        pytest.skip(missing_tools())
    made: list[tuple[dict[str, Any], dict[str, Any]]] = []
    with emulated_backend() as emulated:
        emulate = backend.metal_kernel

        def record(**kernel: Any) -> Any:
            def call(**options: Any) -> Any:
                made.append((kernel, options))
                return emulate(**kernel)(**options)

            return call

        monkeypatch.setattr(backend, "metal_kernel", record)
        draw = cases.random_mla_case if seed % 4 == 0 else cases.random_case
        emulated.attend(cases.build(draw(seed, max_count=90)), keys_per_split=32)
    kept = ("inputs", "template", "output_shapes", "output_dtypes")
    for kernel, options in made:
        call = {name: options[name] for name in kept}
        assert generated_here(kernel, call) == generated_by_mlx(kernel, call)
