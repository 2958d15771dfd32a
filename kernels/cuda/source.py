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
from qsdpa_patch.kernels.cuda.decode_plan import DecodePlan
from qsdpa_patch.kernels.cuda.mla_plan import MlaPlan
from qsdpa_patch.kernels.cuda.prefill_plan import PrefillPlan
from qsdpa_patch.kernels.cuda.wide_plan import WidePlan
from qsdpa_patch.kernels.format import Format

__all__ = [
    "DECODE_HEADERS",
    "MLA_HEADERS",
    "MLA_OUTPUTS",
    "PREFILL_HEADERS",
    "WIDE_HEADERS",
    "cuda_type",
    "decode_body",
    "decode_inputs",
    "decode_outputs",
    "format_mode",
    "headers",
    "mla_body",
    "mla_inputs",
    "mla_merge_body",
    "mla_merge_inputs",
    "prefill_body",
    "prefill_inputs",
    "prologue",
    "stores_new_rows",
]

_COMMON = ("modes.cuh", "ptx.cuh", "formats.cuh", "tiles.cuh", "operands.cuh")
_DECODE_PARTS = (
    "decode_config.cuh", "decode_work.cuh", "decode_copies.cuh", "decode_queries.cuh", "decode_mask.cuh",
    "decode_merge.cuh", "row_quantization.cuh", "new_rows.cuh",
)  # fmt: skip
DECODE_HEADERS = (
    *_COMMON, *_DECODE_PARTS, "decode_query_operands.cuh", "decode_scores.cuh", "decode_logits.cuh",
    "decode_values.cuh", "decode_softmax.cuh", "decode.cuh",
)  # fmt: skip
WIDE_HEADERS = (
    *_COMMON, "wgmma.cuh", "unpack.cuh", *_DECODE_PARTS, "wide_config.cuh", "wide_queries.cuh", "wide_scores.cuh",
    "wide_values.cuh", "wide_softmax.cuh", "wide.cuh",
)  # fmt: skip
_WARPGROUPS = (*_COMMON, "wgmma.cuh", "unpack.cuh", "softmax.cuh")
MLA_HEADERS = (
    *_WARPGROUPS, "mla_config.cuh", "mla_block.cuh", "mla_queries.cuh", "mla_producers.cuh", "mla_handover.cuh",
    "mla_products.cuh", "mla_consumers.cuh", "mla_merge.cuh", "mla.cuh",
)  # fmt: skip
PREFILL_HEADERS = (*_WARPGROUPS, "panels.cuh", "rolling_panels.cuh", "prefill.cuh")
_TYPES = {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float", mx.uint8: "uint8_t"}
_MODES = {"mxfp4": 2, "mxfp8": 3, "nvfp4": 4}
_MASKS = {"none": 0, "causal": 1, "bool": 2, "additive": 3}


@cache
def headers(names: tuple[str, ...]) -> str:
    """The headers ``names``, in an order in which none needs a later one, as text to compile.

    MLX copies and hashes the whole text of a kernel at every call, so the last one, which includes the others, is
    included by path where they are files. They are pasted only where they are not (a package in an archive).
    """
    folder = files("qsdpa_patch").joinpath("kernels", "cuda")
    if isinstance(folder, Path):
        return f'#include "{folder / names[-1]}"\n'
    pasted = "\n".join(folder.joinpath(name).read_text() for name in names)
    skipped = ('#include "', "#pragma once")
    return "\n".join(line for line in pasted.splitlines() if not line.startswith(skipped))


def prologue(name: str, threads: int, names: tuple[str, ...] = DECODE_HEADERS) -> str:
    """What goes before the kernel ``name``: the headers ``names``, and bounds on its launch.

    Without the bounds a thread may get more registers than a block of this size has. MLX has no place for the
    qualifier, so a macro of the kernel's name adds it; the body begins by taking the macro back.
    """
    symbol = f"custom_kernel_{name}"
    return f"{headers(names)}#define {symbol} __launch_bounds__({threads}, 1) {symbol}\n"


def _end_of_bounds(name: str) -> str:
    return f"#undef custom_kernel_{name}\n"


def decode_inputs(sig: Signature, stacked: bool = False) -> list[str]:
    """Names of the inputs of the decode kernel, in order.

    stacked: keys and values are in two arrays. ``written`` then is no operand: MLX runs what it comes from before.
    """
    if stacked:
        names = ["queries", "codes", "all_scales"]
    else:
        names = ["queries", "keys", "key_scales"]
        names += ["key_biases"] * sig.key_format.has_biases
        if not sig.shared_kv:
            names += ["values", "value_scales"] + ["value_biases"] * sig.value_format.has_biases
    names += ["mask"] * (sig.mask in ("bool", "additive"))
    names += ["sinks"] * sig.has_sinks
    names += ["rope_queries", "rope_keys"] * (sig.rope_dim > 0)
    names += ["scale", "tickets"]
    if stacked:
        names += ["written"] + ["new_keys", "new_values"] * stores_new_rows(sig)
    return names


def decode_outputs(sig: Signature, stacked: bool = False) -> list[str]:
    """Names of the outputs of the decode kernel, in order. The third stands for what it writes to its inputs."""
    return ["out", "partials"] + ["stored"] * (stacked and stores_new_rows(sig))


def stores_new_rows(sig: Signature) -> bool:
    """Whether the decode kernel can quantize rows that are new in a cache: those for which there is such a kernel."""
    format, scales = sig.key_format, sig.key_scale_dtype
    alike = (format, sig.key_dim, scales) == (sig.value_format, sig.value_dim, sig.value_scale_dtype)
    in_dtype = not format.is_affine or scales == sig.dtype
    return alike and in_dtype and not format.symmetric and not sig.shared_kv and not sig.rope_dim


_OPERANDS = (
    "queries", "keys", "key_scales", "key_biases", "values", "value_scales", "value_biases", "mask", "sinks",
    "rope_queries", "rope_keys", "scale",
)  # fmt: skip
"""Members of ``DecodeArguments`` before the outputs, in order; the sinks' stride follows them."""

_STACKED = {
    "keys": ("codes", 0), "values": ("codes", 1), "key_scales": ("all_scales", 0), "value_scales": ("all_scales", 1),
    "key_biases": ("all_scales", 2), "value_biases": ("all_scales", 3),
}  # fmt: skip
"""Where they are in a stack of keys and values (``PackedStack``)."""


def _operand(member: str, inputs: list[str]) -> str:
    """The member of the arguments that the input of this name becomes; an empty one without the input."""
    if member not in inputs:
        return "nullptr" if member == "sinks" else "{}"
    if member in ("sinks", "scale"):
        return member
    return f"qsdpa::view({member}, {member}_shape, {member}_strides)"


def _sink_stride(sig: Signature) -> str:
    return "sinks_strides[0]" if sig.has_sinks else "0"


def decode_body(
    name: str, plan: DecodePlan | WidePlan, mask_type: str, sink_type: str, *, stacked: bool = False
) -> str:
    """The body of the decode kernel ``name``. ``mask_type`` and ``sink_type`` are CUDA types.

    stacked: keys and values come as the two arrays of a ``PackedStack``, and the scale as often as there are keys in
    them: the length of that array is how the kernel learns the number of keys.
    """
    sig = plan.signature
    inputs = decode_inputs(sig, stacked)

    def operand(member: str) -> str:
        if stacked and member in _STACKED and (sig.key_format.has_biases or not member.endswith("biases")):
            array, index = _STACKED[member]
            count = 4 if array == "all_scales" and sig.key_format.has_biases else 2
            rows = f"qsdpa::first_rows(qsdpa::view({array}, {array}_shape, {array}_strides), scale_shape[0])"
            return f"qsdpa::stacked({rows}, {index}, {count})"
        return _operand(member, inputs)

    operands = [operand(member) for member in _OPERANDS]
    operands.insert(_OPERANDS.index("sinks") + 1, _sink_stride(sig))
    arguments = ", ".join([*operands, "const_cast<uint32_t*>(tickets)", "out", "partials", str(plan.blocks_at_once)])
    new_rows = "qsdpa::NoNewRows{}"
    if "new_keys" in inputs:
        new_rows = f"qsdpa::NewRows<Config>{{{_operand('new_keys', inputs)}, {_operand('new_values', inputs)}}}"
    decoder = "WideDecoder" if isinstance(plan, WidePlan) else "Decoder"
    return (
        f"{_end_of_bounds(name)}"
        f"using Config = qsdpa::{_decode_config(plan, mask_type, sink_type)};\n"
        f'static_assert(Config::SHARED_BYTES == {plan.shared_bytes}, "the plan and the kernel disagree");\n'
        "extern __shared__ __align__(1024) char qsdpa_shared[];\n"
        f"const qsdpa::DecodeArguments<Config> arguments{{{arguments}}};\n"
        f"qsdpa::{decoder}<Config>(arguments, qsdpa_shared).run({new_rows});\n"
    )


def _decode_config(plan: DecodePlan | WidePlan, mask_type: str, sink_type: str) -> str:
    """What a decode kernel is specialized on."""
    sig = plan.signature
    common = ", ".join(
        (
            _TYPES[sig.dtype],
            f"{sig.key_dim}, {sig.value_dim}",
            _format(sig.key_format, sig.key_scale_dtype),
            _format(sig.value_format, sig.value_scale_dtype),
            f"{plan.rows}, {_mask_kind(sig)}, {mask_type}, {sink_type}",
        )
    )
    if isinstance(plan, WidePlan):
        return f"WideConfig<{common}, {plan.teams}, {plan.stages}>"
    cut = f"{plan.warps}, {plan.stages}, {plan.parts}, {plan.team}"
    return f"DecodeConfig<{common}, {sig.rope_dim}, {int(sig.shared_kv)}, {cut}>"


MLA_OUTPUTS = ["partials", "stats"]
_MLA_OPERANDS = ("queries", "keys", "key_scales", "key_biases", "mask", "rope_queries", "rope_keys", "scale")
"""Members of ``MlaArguments`` before the outputs, in order."""


def mla_inputs(sig: Signature) -> list[str]:
    """Names of the inputs of the kernel for absorbed MLA, in order."""
    left_out = {"tickets", "sinks"}
    return [name for name in decode_inputs(sig) if name not in left_out]


def mla_body(name: str, plan: MlaPlan, mask_type: str) -> str:
    """The body of the kernel ``name`` for absorbed MLA."""
    sig = plan.signature
    inputs = mla_inputs(sig)
    operands = ", ".join(_operand(member, inputs) for member in _MLA_OPERANDS)
    return (
        f"{_end_of_bounds(name)}"
        f"using Config = qsdpa::MlaConfig<{_TYPES[sig.dtype]}, {sig.key_dim}, "
        f"{_format(sig.key_format, sig.key_scale_dtype)}, {_mask_kind(sig)}, {mask_type}, {plan.stages}>;\n"
        f'static_assert(Config::SHARED_BYTES == {plan.shared_bytes}, "the plan and the kernel disagree");\n'
        "extern __shared__ __align__(1024) char qsdpa_shared[];\n"
        f"const qsdpa::MlaArguments<Config> arguments{{{operands}, {', '.join(MLA_OUTPUTS)}}};\n"
        "qsdpa::MlaDecoder<Config>(arguments, qsdpa_shared).run();\n"
    )


def mla_merge_inputs(sig: Signature) -> list[str]:
    """Names of the inputs of the kernel that merges the splits, in order."""
    return [*MLA_OUTPUTS, "queries", *(["sinks"] if sig.has_sinks else [])]


def mla_merge_body(name: str, plan: MlaPlan, sink_type: str) -> str:
    """The body of the kernel ``name`` that merges the splits."""
    sig = plan.signature
    sinks = f"sinks, {_sink_stride(sig)}" if sig.has_sinks else "nullptr, 0"
    return (
        f"{_end_of_bounds(name)}"
        f"qsdpa::MlaMerger<{_TYPES[sig.dtype]}, {sig.key_dim}, {_format(sig.key_format, sig.key_scale_dtype)}, "
        f"{plan.merge_parts}, {sink_type}>"
        f"(partials, stats, {sinks}, out, queries_shape[1], queries_shape[2], stats_shape[1]).run();\n"
    )


_PREFILL_OPERANDS = (
    "queries", "keys", "key_scales", "key_biases", "values", "value_scales", "value_biases", "mask", "sinks", "scale",
)  # fmt: skip
"""Members of ``PrefillArguments`` before the outputs, in order; the sinks' stride follows them."""


def prefill_inputs(sig: Signature) -> list[str]:
    """Names of the inputs of the kernel for many query rows, in order."""
    return [name for name in decode_inputs(sig._replace(shared_kv=False, rope_dim=0)) if name != "tickets"]


def prefill_body(name: str, plan: PrefillPlan, mask_type: str, sink_type: str) -> str:
    """The body of the kernel ``name`` for many query rows."""
    sig = plan.signature
    inputs = prefill_inputs(sig)
    operands = [_operand(member, inputs) for member in _PREFILL_OPERANDS]
    operands.insert(_PREFILL_OPERANDS.index("sinks") + 1, _sink_stride(sig))
    parameters = ", ".join(
        (
            _TYPES[sig.dtype],
            f"{sig.key_dim}, {sig.value_dim}",
            _format(sig.key_format, sig.key_scale_dtype),
            _format(sig.value_format, sig.value_scale_dtype),
            f"{_mask_kind(sig)}, {mask_type}, {sink_type}, {plan.key_stages}, {plan.value_stages}",
        )
    )
    return (
        f"{_end_of_bounds(name)}"
        f"using Config = qsdpa::PrefillConfig<{parameters}>;\n"
        f'static_assert(Config::SHARED_BYTES == {plan.shared_bytes}, "the plan and the kernel disagree");\n'
        "extern __shared__ __align__(1024) char qsdpa_shared[];\n"
        f"const qsdpa::PrefillArguments<Config> arguments{{{', '.join(operands)}, out}};\n"
        "qsdpa::Prefiller<Config>(arguments, qsdpa_shared).run();\n"
    )


def format_mode(format: Format) -> int:
    """The format's number in ``formats.cuh``."""
    if format.is_affine:
        return 1 if format.symmetric else 0
    return _MODES[format.mode]


def _mask_kind(sig: Signature) -> int:
    """The mask's number in ``operands.cuh``."""
    return _MASKS[sig.mask]


def cuda_type(dtype: mx.Dtype) -> str:
    return "bool" if dtype == mx.bool_ else _TYPES[dtype]


def _format(format: Format, scale: mx.Dtype) -> str:
    return f"qsdpa::Format<{format.bits}, {format.group_size}, {format_mode(format)}, {_TYPES[scale]}>"
