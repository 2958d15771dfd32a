"""The source that ``mx.fast.metal_kernel`` generates around a kernel's body.

A port of ``write_signature`` in MLX's mlx/backend/common/metal_kernel.cpp; tests compare it with MLX's own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

__all__ = ["TYPE_NAMES", "Input", "function_name", "generate", "shape_arguments", "template_values"]

TYPE_NAMES = {
    mx.bool_: "bool", mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
    mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t", mx.int64: "int64_t", mx.float16: "float16_t",
    mx.float32: "float", mx.bfloat16: "bfloat16_t",
}  # fmt: skip
CONSTANT_BELOW = 8  # elements: smaller inputs arrive in the constant address space
_SCALAR_ATTRIBUTES = (
    "dispatch_quadgroups_per_threadgroup", "dispatch_simdgroups_per_threadgroup", "quadgroup_index_in_threadgroup",
    "quadgroups_per_threadgroup", "simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup",
    "thread_execution_width", "thread_index_in_quadgroup", "thread_index_in_simdgroup", "thread_index_in_threadgroup",
    "threads_per_simdgroup",
)  # fmt: skip
_VECTOR_ATTRIBUTES = (
    "dispatch_threads_per_threadgroup", "grid_origin", "grid_size", "thread_position_in_grid",
    "thread_position_in_threadgroup", "threadgroup_position_in_grid", "threadgroups_per_grid", "threads_per_grid",
    "threads_per_threadgroup",
)  # fmt: skip

TemplateArgument = tuple[str, "int | bool | mx.Dtype"]


@dataclass(frozen=True)
class Input:
    name: str
    dtype: mx.Dtype
    ndim: int
    size: int


def template_values(template: Sequence[TemplateArgument]) -> list[tuple[str, str]]:
    """Template arguments as written in C++."""
    return [(name, TYPE_NAMES[v] if isinstance(v, mx.Dtype) else str(int(v))) for name, v in template]


def function_name(
    name: str, template: Sequence[TemplateArgument], inputs: Sequence[Input], outputs: Sequence[mx.Dtype]
) -> str:
    """The name of the kernel function, made from all that its source depends on."""
    parts = ["custom_kernel_" + name]
    if template:
        parts.append("_" + "_".join(value for _, value in template_values(template)))
    for x in inputs:
        kind = "s" if x.ndim == 0 else "c" if x.size < CONSTANT_BELOW else ""
        parts.append(TYPE_NAMES[x.dtype] + kind)
    return "_".join([*parts, *(TYPE_NAMES[d] for d in outputs)])


def shape_arguments(x: Input, body: str) -> list[str]:
    """Which of ``_shape``, ``_strides`` and ``_ndim`` the kernel gets for ``x``: those that its body names."""
    return [] if x.ndim == 0 else [suffix for suffix in ("_shape", "_strides", "_ndim") if x.name + suffix in body]


def generate(
    function: str,
    header: str,
    body: str,
    inputs: Sequence[Input],
    outputs: Sequence[tuple[str, mx.Dtype]],
    template: Sequence[TemplateArgument],
    atomic_outputs: bool,
) -> str:
    """The source of the kernel, without MLX's utilities and the explicit instantiation."""
    text = header
    if template:
        kinds = ["bool" if isinstance(v, bool) else "int" if isinstance(v, int) else "typename" for _, v in template]
        text += f"template <{', '.join(f'{kind} {name}' for kind, (name, _) in zip(kinds, template))}>\n"
    text += f"[[kernel]] void {function}(\n"
    types = {"_shape": "const constant int*", "_strides": "const constant int64_t*", "_ndim": "const constant int&"}
    index = 0
    for x in inputs:
        space = "constant" if x.size < CONSTANT_BELOW else "device"
        text += f"  const {space} {TYPE_NAMES[x.dtype]}{'&' if x.ndim == 0 else '*'} {x.name} [[buffer({index})]],\n"
        index += 1
        for suffix in shape_arguments(x, body):
            text += f"  {types[suffix]} {x.name}{suffix} [[buffer({index})]],\n"
            index += 1
    attributes = _attributes(body)
    for name, dtype in outputs:
        element = f"atomic<{TYPE_NAMES[dtype]}>" if atomic_outputs else TYPE_NAMES[dtype]
        text += f"  device {element}* {name} [[buffer({index})]]"
        text += ",\n" if index < len(inputs) + len(outputs) - 1 or attributes else ") {\n"
        index += 1
    if attributes:
        text += ",\n".join(f"  {kind} {name} [[{name}]]" for name, kind in attributes) + ") {\n"
    return f"{text}{body}\n}}\n"


def _attributes(body: str) -> list[tuple[str, str]]:
    """Thread attributes that the body names, in MLX's order, with their types."""
    kinds = {**dict.fromkeys(_SCALAR_ATTRIBUTES, "uint"), **dict.fromkeys(_VECTOR_ATTRIBUTES, "uint3")}
    return [(name, kinds[name]) for name in sorted(kinds) if name in body]
