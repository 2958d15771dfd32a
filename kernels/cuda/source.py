"""The text of the CUDA kernels.

The kernels are templates in the headers of this folder. MLX makes the signature of a kernel from the names of its
inputs and outputs and wants its body as text: a body here names the operands of a signature, fixes the template
arguments, and calls the template.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.cuda.plan import DecodePlan, format_mode, mask_kind
from qsdpa_patch.kernels.format import Format

__all__ = ["DECODE_OUTPUTS", "decode_body", "decode_inputs", "headers", "prologue"]

_HEADERS = ("ptx.cuh", "formats.cuh", "tiles.cuh", "decode.cuh")
_TYPES = {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float", mx.uint8: "uint8_t"}

DECODE_OUTPUTS = ["out", "partials", "stats"]


@cache
def headers(names: tuple[str, ...] = _HEADERS) -> str:
    """Headers of this folder, by default those of the decode kernel, as text to compile.

    MLX copies and hashes the whole text of a kernel at every call, so they are included by path where they are files,
    and pasted only where they are not (a package in an archive).
    """
    folder = files("qsdpa_patch").joinpath("kernels", "cuda")
    if isinstance(folder, Path):
        return "".join(f'#include "{folder / name}"\n' for name in names)
    pasted = "\n".join(folder.joinpath(name).read_text() for name in names)
    skipped = ('#include "', "#pragma once")
    return "\n".join(line for line in pasted.splitlines() if not line.startswith(skipped))


def prologue(name: str, threads: int) -> str:
    """What goes before the kernel ``name``: the headers, and bounds on its launch.

    Without the bounds a thread may get more registers than a block of this size has. MLX has no place for the
    qualifier, so a macro of the kernel's name adds it; the body begins by taking the macro back.
    """
    symbol = f"custom_kernel_{name}"
    return f"{headers()}#define {symbol} __launch_bounds__({threads}) {symbol}\n"


def _end_of_bounds(name: str) -> str:
    return f"#undef custom_kernel_{name}\n"


def decode_inputs(sig: Signature) -> list[str]:
    """Names of the inputs of the decode kernel, in order."""
    names = ["queries", "keys", "key_scales"]
    names += ["key_biases"] * sig.key_format.has_biases
    if not sig.shared_kv:
        names += ["values", "value_scales"] + ["value_biases"] * sig.value_format.has_biases
    names += ["mask"] * (sig.mask in ("bool", "additive"))
    names += ["sinks"] * sig.has_sinks
    names += ["rope_queries", "rope_keys"] * (sig.rope_dim > 0)
    return [*names, "scale", "tickets"]


_OPERANDS = (
    "queries", "keys", "key_scales", "key_biases", "values", "value_scales", "value_biases", "mask", "sinks",
    "rope_queries", "rope_keys", "scale",
)  # fmt: skip
"""Members of ``DecodeArguments`` before the outputs, in order."""


def decode_body(name: str, plan: DecodePlan, mask_type: str, sink_type: str) -> str:
    """The body of the decode kernel ``name``. ``mask_type`` and ``sink_type`` are CUDA types."""
    sig = plan.signature
    inputs = decode_inputs(sig)

    def operand(member: str) -> str:
        if member not in inputs:
            return "nullptr" if member == "sinks" else "{}"
        if member in ("sinks", "scale"):
            return member
        return f"qsdpa::view({member}, {member}_shape, {member}_strides)"

    arguments = ", ".join([*map(operand, _OPERANDS), "const_cast<uint32_t*>(tickets)", *DECODE_OUTPUTS])
    parameters = ", ".join(
        (
            _TYPES[sig.dtype],
            f"{sig.key_dim}, {sig.value_dim}",
            _format(sig.key_format, sig.key_scale_dtype),
            _format(sig.value_format, sig.value_scale_dtype),
            f"{plan.row_blocks}, {mask_kind(sig)}, {mask_type}, {sink_type}, {sig.rope_dim}, {int(sig.shared_kv)}",
            f"{plan.warps}, {plan.stages}, {plan.parts}, {plan.team}",
        )
    )
    return (
        f"{_end_of_bounds(name)}"
        f"using Config = qsdpa::DecodeConfig<{parameters}>;\n"
        f'static_assert(Config::SHARED_BYTES == {plan.shared_bytes}, "the plan and the kernel disagree");\n'
        "extern __shared__ __align__(16) char qsdpa_shared[];\n"
        f"const qsdpa::DecodeArguments<Config> arguments{{{arguments}}};\n"
        "qsdpa::Decoder<Config>(arguments, qsdpa_shared).run();\n"
    )


def cuda_type(dtype: mx.Dtype) -> str:
    return "bool" if dtype == mx.bool_ else _TYPES[dtype]


def _format(format: Format, scale: mx.Dtype) -> str:
    return f"qsdpa::Format<{format.bits}, {format.group_size}, {format_mode(format)}, {_TYPES[scale]}>"
