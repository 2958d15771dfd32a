"""Faults put into the kernel that quantizes rows, one at a time, and what finds each; see mutations.py."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import pytest

from qsdpa_patch.kernels import row_quantization
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.metal import sources
from qsdpa_patch.kernels.row_kernel import Rows
from tests.metal import mlx_quantization
from tests.metal.emulated_backend import emulated_row_quantization
from tests.metal.emulator import MetalError

__all__ = ["ROW_MUTATIONS", "RowMutation", "row_mutation_caught_by"]

_FILE = "row_quantization.metal"
_FOUR = Format.affine(4)
_ROTATED = Format.affine(4, rotated=True)


@dataclass(frozen=True)
class RowMutation:
    """``old`` becomes ``new``; ``caught`` is a pattern in what finds it, for rows of ``dim`` numbers in ``format``."""

    name: str
    old: str
    new: str
    caught: str = "bytes differ"
    format: Format = _FOUR
    dim: int = 128
    dtype: mx.Dtype = mx.float32


ROW_MUTATIONS = (
    RowMutation("edge at the nearer end of the range", "metal::abs(low) > metal::abs(high)", "low < -high * 2"),
    RowMutation("scale not fitted to the edge", "scale = zero ? scale : edge / steps;", ""),
    RowMutation("codes cut off, not rounded", "metal::min(metal::round(", "metal::min(metal::floor("),
    RowMutation("halves rounded to even", "metal::min(metal::round(", "metal::min(metal::rint("),
    RowMutation("groups of zeros divided by nothing", "/ last, 1e-7f)", "/ last, 0.0f)"),
    RowMutation("range of half of the group", "apart < LANES", "apart < LANES / 2"),
    RowMutation("range without zero at its upper end", "high = 0.0f, scale", "high = -Limits<float>::max, scale"),
    RowMutation("bias of the next group", "out[ulong(heads) * count * groups]",
                "out[ulong(heads) * count * groups + 1]",
                caught="stored by two|never written|out-of-bounds"),
    RowMutation("values read from the keys", "is_first ? first : second", "first"),
    RowMutation("heads of the values counted on", "head - first_heads", "head", "slice|out-of-bounds"),
    RowMutation("stride of heads ignored", "* side.head_stride", "* int64_t(count) * DIM",
                "slice|out-of-bounds|differ"),
    RowMutation("stride within a row ignored", ", DIM - 1) * side.stride", ", DIM - 1)", "slice|out-of-bounds|differ"),
    RowMutation("batch stride of the first side for both", "sequence * side.batch_stride",
                "sequence * first.head_stride", "slice|out-of-bounds|differ"),
    RowMutation("rows read past their end", "metal::min(int(pack) * 8 + i, DIM - 1)", "(int(pack) * 8 + i)",
                "slice|out-of-bounds|differ", Format.affine(4, 32), 72),
    RowMutation("threads past the last row store", "if (inside) {", "if (true) {", "out-of-bounds|stored by two|race",
                Format.affine(4, 32), 96),
    RowMutation("half of an 8-bit pack", "((device uint*)out)[1] = uint(codes >> 32);", "", "never written",
                Format.affine(8)),
    RowMutation("codes of 5 bits packed as 32-bit", "ulong(code) << (BITS * i)", "ulong(uint(code) << (BITS * i))",
                format=Format.affine(5)),
    RowMutation("power of two below the scale", "code < 0xfe && e8m0_value(code) < x", "false",
                format=Format.named("mxfp4")),
    RowMutation("halves of fp4 rounded up", "!(a <= 0.25f)", "!(a < 0.25f)", format=Format.named("mxfp4")),
    RowMutation("fp4 without the sign of zeros", "as_type<uint>(x) >> 31 << 3", "uint(x < 0) << 3",
                format=Format.named("nvfp4")),
    RowMutation("fp8 rounded down", "(a + 0x7ffff + ((a >> 20) & 1)", "(a", format=Format.named("mxfp8")),
    RowMutation("fp8 without its small numbers", "a < as_type<uint>(0.015625f)", "a == 0",
                format=Format.named("mxfp8")),
    RowMutation("fp8 scale beyond its range", "a >= as_type<uint>(448.0f)", "a > as_type<uint>(1e9f)",
                format=Format.named("nvfp4")),
    RowMutation("scale of zeros inverted", "value == 0 ? 0.0f : 1.0f / value", "1.0f / value",
                format=Format.named("nvfp4")),
    RowMutation("scale of nvfp4 for groups of 32", "float_codes<MODE>(x, largest_of_group<GROUP / 8>",
                "float_codes<MODE>(x, largest_of_group<4>", format=Format.named("nvfp4")),
    RowMutation("rotation: differences the other way round", "second ? other - x[i]", "second ? x[i] - other",
                format=_ROTATED),
    RowMutation("rotation: not rounded between its steps", "apart == 8 || ", "", format=_ROTATED, dtype=mx.float16),
    RowMutation("rotation: not scaled", "x[i] *= scale;", "", format=_ROTATED),
)  # fmt: skip


def row_mutation_caught_by(mutation: RowMutation) -> str:
    """What the emulator or the comparison with MLX's kernels finds; empty if nothing."""
    read = sources._read

    def mutated(name: str) -> str:
        text = read(name)
        if name != _FILE:
            return text
        assert mutation.old in text, f"'{mutation.name}': nothing to mutate in {name}"
        return text.replace(mutation.old, mutation.new)

    rows = Rows(mutation.format, mutation.dtype, mutation.dim, 2)
    with emulated_row_quantization(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_read", mutated)
        patch.setattr(sources, "row_quantization_header", sources.row_quantization_header.__wrapped__)
        try:
            return _difference(rows) or row_quantization.has_row_kernel("metal", rows)[1]
        except MetalError as error:
            return " ".join(str(error).split())


def _difference(rows: Rows) -> str:
    """How the kernel's output differs for rows that lie apart in memory, with halves, signed zeros and extremes."""
    x = mx.random.normal((2, 2, rows.dim, 7), key=mx.random.key(0))
    x = mx.where(mx.abs(x) < 0.3, -0.0, mx.round(8 * x) / 8) * mx.array([1, 2, 3, 4, 5, 1e5, 2e-3])
    x = x.astype(rows.dtype)
    sides = [x.swapaxes(2, 3)[:, :, 1:], x.swapaxes(2, 3)[:, 1:, :6] - 3]
    kernel = row_quantization._kernel("metal", rows)
    actual = row_quantization._prepared(kernel, rows, 2, 3, 6)(sides)
    wrong = row_quantization.bytes_apart(actual, mlx_quantization.quantize_rows(sides, rows.format))
    return f"{wrong} bytes differ" if wrong else ""
