"""The Metal sources, and what is put in front of them for one kernel family."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.metal.plan import Kind

__all__ = ["decode_body", "decode_header", "merge_body", "merge_header", "mode_of", "row_quantization_header"]

_MODES = {"affine": 0, "symmetric": 1, "mxfp4": 2, "mxfp8": 3, "nvfp4": 4}
"""Values of ``Mode`` in dequantize.metal."""


def mode_of(format: Format) -> int:
    return _MODES["symmetric" if format.symmetric else format.mode]


@cache
def _read(name: str) -> str:
    """A source file without comments and indentation: MLX hashes the text at every launch."""
    text = files("qsdpa_patch").joinpath("kernels", "metal", name).read_text()
    text = re.sub(r"//[^\n]*", "", text)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip()) + "\n"


def decode_body(kind: Kind) -> str:
    files = {Kind.FEW_ROWS: "few_rows.metal", Kind.LATENT: "latent.metal"}
    return _read("prologue.metal") + _read(files.get(kind, "matrix.metal"))


def merge_body() -> str:
    return _read("merge.metal")


@cache
def decode_header(signature: Signature, split: bool, stacked: bool) -> str:
    """Functions for the decode kernel, and which inputs it has. ``stacked``: keys and values share two arrays."""
    biased = stacked and signature.key_format.has_biases
    defines = {
        "SPLIT": split,
        "HAS_MASK": signature.mask in ("bool", "additive"),
        "MASK_IS_BOOL": signature.mask == "bool",
        "IS_CAUSAL": signature.mask == "causal",
        "HAS_SINKS": signature.has_sinks,
        "HAS_ROPE": signature.rope_dim > 0,
        # Of a PackedStack: how many sides it has, and before which planes there are how many times the key heads.
        "STACKED": 2 if stacked else 1,
        "VALUES_AT": stacked,
        "KEY_BIASES_AT": 2 if biased else 0,
        "VALUE_BIASES_AT": 3 if biased else stacked,
    }
    lines = [f"#define {name} {int(value)}" for name, value in defines.items()]
    for name, other in _aliases(signature, stacked).items():
        lines += [f"#define {name}{suffix} {other}{suffix}" for suffix in ("", "_shape", "_strides")]
    functions = _read("dequantize.metal") + _read("fragments.metal") + _read("attention.metal")
    return functions + "\n".join(lines) + "\n"


def _aliases(signature: Signature, stacked: bool) -> dict[str, str]:
    """Names of the sources for parts that are no input of their own, and the inputs in which they are."""
    if stacked:
        parts = [(f"{side}_{part}", part) for side in ("key", "value") for part in ("codes", "scales")]
        return dict(parts) | {"key_biases": "scales", "value_biases": "scales"}
    aliases = {}
    if not signature.key_format.has_biases:
        aliases["key_biases"] = "key_scales"
    if signature.shared_kv:
        aliases |= {f"value_{part}": f"key_{part}" for part in ("codes", "scales", "biases")}
    elif not signature.value_format.has_biases:
        aliases["value_biases"] = "value_scales"
    return aliases


@cache
def merge_header(has_sinks: bool) -> str:
    return f"#define HAS_SINKS {int(has_sinks)}\n"


@cache
def row_quantization_header() -> str:
    return _read("row_quantization.metal")
