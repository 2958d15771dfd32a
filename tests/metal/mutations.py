"""Faults put into the kernels one at a time, and what finds each: the table is part of the proof.

python -m tests.metal.mutations
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.metal import sources
from tests import attention_cases as cases
from tests.attention_cases import Case
from tests.metal.emulated_backend import EmulatedBackend, emulated_backend
from tests.metal.emulator import MetalError
from tests.metal.row_mutations import ROW_MUTATIONS, row_mutation_caught_by

__all__ = ["MUTATIONS", "Mutation", "caught_by"]

_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
_SMALL = Case(seed=1, kv_heads=2, group=5, count=75, capacity=90, mask="bool", sinks=True)
_LONG = replace(_SMALL, count=200, capacity=200)
_CAUSAL = Case(seed=2, group=3, length=5, count=70, capacity=70, mask="causal", key_dim=96, value_dim=96,
               key_format=Format.affine(5, 32), value_format=Format.affine(3, 32))  # fmt: skip
_TEAM = Case(seed=3, group=16, count=75, capacity=90, key_dim=64, value_dim=256, batch=2)
_MLA = Case(seed=4, kv_heads=1, group=20, count=75, capacity=90, key_dim=256, value_dim=256, rope_dim=64)
_ROPE = replace(_MLA, key_dim=128, value_dim=128)
_STACKED = replace(_SMALL, stacked=True)
_MLA_MASK = replace(_MLA, mask="bool", sinks=True)
_FLOAT4 = Case(
    seed=5, group=5, count=70, capacity=70, key_format=Format.named("mxfp4"), value_format=Format.named("nvfp4")
)
_FEW = Case(
    seed=7,
    kv_heads=2,
    group=2,
    length=2,
    count=140,
    capacity=150,
    batch=2,
    key_dim=96,
    value_dim=128,
    mask="causal",
    sinks=True,
)
_FEW_LONG = replace(_FEW, count=300, capacity=300)
_FEW_96 = replace(_FEW, value_dim=96)
_EIGHT = replace(_SMALL, key_format=Format.affine(8, 64), value_format=Format.affine(8, 32))
_FLOAT8 = replace(_SMALL, key_format=Format.named("mxfp8"))
_ONE_KEY = Case(seed=6, kv_heads=1, count=1, capacity=1, key_dim=32, value_dim=32,
                key_format=Format.affine(5, 32), value_format=Format.affine(5, 32))  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new``, everywhere in a file.

    caught: a pattern in what :func:`caught_by` says. case: the call that shows it, as one launch and split, with
    its softmax scale multiplied by ``steepness``.
    """

    name: str
    file: str
    old: str
    new: str
    caught: str
    case: Case = _SMALL
    steepness: float = 1


MUTATIONS = (
    Mutation(
        "codes shifted by one bit",
        "dequantize.metal",
        "const int first = i * BITS;",
        "const int first = i * BITS + 1;",
        "wrong",
        _CAUSAL,
    ),
    Mutation(
        "4-bit codes in another order",
        "dequantize.metal",
        "codes[4 + i] = float(pairs[i].y);",
        "codes[7 - i] = float(pairs[i].y);",
        "wrong",
    ),
    Mutation(
        "what makes codes floats not taken off",
        "dequantize.metal",
        "-1024.0h * unit",
        "-1024.0h",
        "wrong",
    ),
    Mutation(
        "8-bit codes without their shift",
        "dequantize.metal",
        "codes_of_halves<8, 0>(words[i] >> 8)",
        "codes_of_halves<8, 0>(words[i])",
        "wrong",
        _EIGHT,
    ),
    Mutation(
        "a 5-bit code looked for in too few bits",
        "dequantize.metal",
        "first + BITS <= 23 ?",
        "first + BITS <= 25 ?",
        "wrong",
        _CAUSAL,
    ),
    Mutation(
        "a 5-bit pack without its fourth byte",
        "dequantize.metal",
        "third | uint(b[3]) << 8",
        "third",
        "wrong",
        _CAUSAL,
    ),
    Mutation(
        "scale of the next group",
        "dequantize.metal",
        "pack / (GROUP / 8);",
        "pack / (GROUP / 8) + 1;",
        "outside of the slice",
    ),
    Mutation(
        "small inputs taken for device memory",
        "dequantize.metal",
        "inline const constant U* retype(const constant T* p)",
        "inline const device U* retype(const constant T* p)",
        "compile failed",
        _ONE_KEY,
    ),
    Mutation(
        "pack read past the end of a row",
        "matrix.metal",
        "pack < KEY_DIM / 8",
        "pack < KEY_DIM / 8 + 4",
        "slice|out-of-bounds|wrong",
        _CAUSAL,
    ),
    Mutation(
        "query row read past its end",
        "attention.metal",
        "(DIM % 64 == 0 || first + i < DIM)",
        "(true)",
        "out-of-bounds",
        _CAUSAL,
    ),
    Mutation(
        "keys beyond the last are read",
        "matrix.metal",
        "offsets_ahead(key_row, 8 * k + i, key_strides, last_key)",
        "offsets_of_key(tile - begin + at.column + 8 * k + i, key_strides)",
        "slice|out-of-bounds",
    ),
    Mutation(
        "values beyond the last are read",
        "matrix.metal",
        "offsets_ahead(value_row, 8 * k, value_strides, last_value)",
        "offsets_of_key((TEAM ? base : tile) - begin + at.row + 8 * k, value_strides)",
        "slice|out-of-bounds",
    ),
    Mutation(
        "keys of the first step again",
        "matrix.metal",
        "key_row = offsets_ahead(key_row, STEP,",
        "key_row = offsets_ahead(key_row, 0,",
        "wrong",
        _LONG,
    ),
    Mutation(
        "values of the first step again",
        "matrix.metal",
        "value_row = offsets_ahead(value_row, STEP,",
        "value_row = offsets_ahead(value_row, 0,",
        "wrong",
        _LONG,
    ),
    Mutation(
        "scales beyond the last are read",
        "dequantize.metal",
        "metal::min(row.scales + keys * strides.scales, last.scales)",
        "row.scales + keys * strides.scales",
        "slice|out-of-bounds",
    ),
    Mutation(
        "every split from the first key on",
        "prologue.metal",
        "begin * value_codes_strides[2]",
        "0",
        "wrong",
    ),
    Mutation(
        "keys beyond the last count", "matrix.metal", "bool visible = key < end;", "bool visible = true;", "wrong"
    ),
    Mutation(
        "4-bit floats without their sign",
        "dequantize.metal",
        "(top & 0x80008000u) | ((top >> 3)",
        "((top >> 3)",
        "wrong",
        _FLOAT4,
    ),
    Mutation(
        "8-bit floats all of the upper bytes",
        "dequantize.metal",
        "words[i / 2] : words[i / 2] << 8",
        "words[i / 2] : words[i / 2]",
        "wrong",
        _FLOAT8,
    ),
    Mutation(
        "8-bit scale read as another exponent", "dequantize.metal", "exponent << 23", "exponent << 22", "wrong", _FLOAT4
    ),
    Mutation(
        "causal mask off by one",
        "matrix.metal",
        "key <= count - length + position[r]",
        "key < count - length + position[r]",
        "wrong",
        _CAUSAL,
    ),
    Mutation(
        "causal mask of one row for all",
        "matrix.metal",
        "position[r] = row % length;",
        "position[r] = 0;",
        "wrong",
        _CAUSAL,
    ),
    Mutation(
        "mask of the first head for all",
        "attention.metal",
        "shape[1] == 1 ? 0 : head * strides[1]",
        "0",
        "wrong",
    ),
    Mutation(
        "stride of keys ignored",
        "prologue.metal",
        "uint(key_codes_strides[2])",
        "uint(KEY_DIM * KEY_BITS / 64)",
        "wrong",
    ),
    Mutation(
        "head stride of a dense buffer",
        "prologue.metal",
        "kv_head * key_codes_strides[1]",
        "kv_head * count * key_codes_strides[2]",
        "slice|wrong",
    ),
    Mutation(
        "batch stride of values ignored", "prologue.metal", "batch * value_scales_strides[0]", "0", "wrong", _TEAM
    ),
    Mutation("stacked: key heads counted with values", "prologue.metal", "/ STACKED", "", "out-of-bounds", _STACKED),
    Mutation(
        "stacked: keys for values", "prologue.metal", "kv_head + VALUES_AT * kv_heads", "kv_head", "wrong", _STACKED
    ),
    Mutation(
        "stacked: scales for biases of keys",
        "prologue.metal",
        "kv_head + KEY_BIASES_AT * kv_heads",
        "kv_head",
        "wrong",
        _STACKED,
    ),
    Mutation(
        "stacked: biases of keys for those of values",
        "prologue.metal",
        "kv_head + VALUE_BIASES_AT * kv_heads",
        "key_bias_plane",
        "wrong",
        _STACKED,
    ),
    Mutation("scores not scaled", "matrix.metal", "scores[r][k] *= scale;", "", "wrong"),
    Mutation(
        "rope term of other queries",
        "matrix.metal",
        "load_numbers<ROPE_DIM, 16>(head_rope_queries",
        "load_numbers<ROPE_DIM, 16>(head_queries",
        "out-of-bounds|wrong",
        _ROPE,
    ),
    Mutation("running sum not rescaled", "matrix.metal", "total[r] *= decay;", "", "wrong", _CAUSAL),
    Mutation("output not rescaled", "matrix.metal", "out[r * FRAGMENTS + i] *= decay;", "", "wrong", _CAUSAL),
    Mutation(
        "peak of half of the lanes",
        "fragments.metal",
        "return metal::max(x, simd_shuffle_xor(x, ushort(8)));",
        "return x;",
        "wrong",
    ),
    Mutation(
        "sum over the wrong lanes",
        "fragments.metal",
        "x += simd_shuffle_xor(x, ushort(1));",
        "x += simd_shuffle_xor(x, ushort(2));",
        "wrong",
    ),
    Mutation(
        "fragments placed by another rule",
        "fragments.metal",
        "(quad & 2) * 2 + (int(lane) % 2) * 2",
        "(quad & 2) + (int(lane) % 2) * 4",
        "wrong|race|stored",
    ),
    Mutation(
        "no barrier after the peaks",
        "matrix.metal",
        "new_peak[r];\n}\n}\n" + _BARRIER,
        "new_peak[r];\n}\n}\n",
        "uninitialised threadgroup",
        _TEAM,
    ),
    Mutation(
        "no barrier after the weights",
        "matrix.metal",
        "scores[r][k][1];\n}\n}\n" + _BARRIER,
        "scores[r][k][1];\n}\n}\n",
        "uninitialised threadgroup",
        _TEAM,
    ),
    Mutation(
        "no barrier between two parts of the output",
        "matrix.metal",
        "= Output(sum);\n}\n}\n" + _BARRIER,
        "= Output(sum);\n}\n}\n",
        "race",
        _CAUSAL,
    ),
    Mutation(
        "a barrier that a part of the threads reaches",
        "matrix.metal",
        "if (!TEAM && tile >= end) {",
        "if (tile >= end) {",
        "barrier",
        _TEAM,
    ),
    Mutation(
        "SIMD functions in a part of the lanes",
        "fragments.metal",
        "x = metal::max(x, simd_shuffle_xor(x, ushort(1)));",
        "if (x > 0) x = metal::max(x, simd_shuffle_xor(x, ushort(1)));",
        "divergent",
    ),
    Mutation(
        "rows past the last are stored",
        "matrix.metal",
        "&& row < row_count) {",
        ") {",
        "stored by two|out-of-bounds|race|wrong",
    ),
    Mutation(
        "the last unit of the output left out",
        "matrix.metal",
        "if (unit < ROW_TILES * VALUE_CHUNKS && row",
        "if (unit + 1 < ROW_TILES * VALUE_CHUNKS && row",
        "never written",
    ),
    Mutation("sink left out of the sum", "matrix.metal", "sum += fast::exp(sink - common);", "", "wrong"),
    Mutation(
        "few rows: sums of the wrong lanes", "few_rows.metal", "fold<4 * ROWS, 4>", "fold<4 * ROWS, 8>", "wrong", _FEW
    ),
    Mutation(
        "few rows: sums folded in another order",
        "few_rows.metal",
        "at.row % 4) + at.column",
        "at.row / 2) + at.column",
        "race",
        _FEW,
    ),
    Mutation(
        "few rows: half of a sum",
        "attention.metal",
        "keep + simd_shuffle_xor(give, ushort(MASK))",
        "keep",
        "wrong",
        _FEW,
    ),
    Mutation(
        "few rows: no barrier before the weights are read",
        "few_rows.metal",
        "= weight;\n}\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n",
        "= weight;\n}\n",
        "race|uninitialised",
        _FEW,
    ),
    Mutation(
        "few rows: no barrier before the weights are replaced",
        "few_rows.metal",
        "simdgroup_barrier(mem_flags::mem_threadgroup);\n}\n",
        "}\n",
        "race",
        _FEW,
    ),
    Mutation(
        "few rows: no barrier in the merge",
        "few_rows.metal",
        "= out[r][e];\n}\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n",
        "= out[r][e];\n}\n",
        "race|uninitialised",
        _FEW,
    ),
    Mutation(
        "few rows: values of the next key",
        "few_rows.metal",
        "offsets_of_key(simd_gid * TILE + own_key, value_strides)",
        "offsets_of_key(simd_gid * TILE + own_key + 1, value_strides)",
        "wrong",
        _FEW,
    ),
    Mutation(
        "few rows: keys of the first tile again",
        "few_rows.metal",
        "key_row = offsets_ahead(key_row, SIMDGROUPS * TILE,",
        "key_row = offsets_ahead(key_row, 0,",
        "wrong",
        _FEW_LONG,
    ),
    Mutation(
        "few rows: values of a later tile",
        "few_rows.metal",
        "value_row = offsets_ahead(value_row, (SIMDGROUPS - 1) * TILE,",
        "value_row = offsets_ahead(value_row, SIMDGROUPS * TILE,",
        "wrong",
        _FEW_LONG,
    ),
    Mutation(
        "few rows: weights of a lane without a key",
        "few_rows.metal",
        "min(lane / LANES, KEYS_AT_ONCE - 1)",
        "(lane / LANES)",
        "uninitialised|race|out-of-bounds",
        _FEW_96,
    ),
    Mutation(
        "few rows: a part of the values left out",
        "few_rows.metal",
        "value_row = offsets_ahead(value_row, READS * KEYS_AT_ONCE,",
        "value_row = offsets_ahead(value_row, KEYS_AT_ONCE,",
        "wrong",
        _FEW,
    ),
    Mutation(
        "few rows: no barrier between two rows of the output",
        "few_rows.metal",
        "}\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n}\n",
        "}\n}\n",
        "race",
        _FEW,
    ),
    Mutation(
        "few rows: lanes not merged",
        "few_rows.metal",
        "k < KEYS_AT_ONCE; k++",
        "k < KEYS_AT_ONCE - 1; k++",
        "wrong",
        _FEW,
    ),
    Mutation(
        "few rows: output not rescaled", "few_rows.metal", "out[r][e] *= decay;", "", "wrong", _FEW_LONG, steepness=8
    ),
    Mutation(
        "few rows: running sum not rescaled",
        "few_rows.metal",
        "total[r] *= decay;",
        "",
        "wrong",
        _FEW_LONG,
        steepness=8,
    ),
    Mutation(
        "few rows: one position for all rows",
        "few_rows.metal",
        "const int position = r % length;",
        "const int position = 0;",
        "wrong",
        _FEW,
    ),
    Mutation(
        "latent: no barrier after the parts of the scores",
        "latent.metal",
        "= part;\n}\n}\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n",
        "= part;\n}\n}\n",
        "race|uninitialised",
        _MLA,
    ),
    Mutation(
        "latent: no barrier after the weights",
        "latent.metal",
        "= decay[1];\n}\n}\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n",
        "= decay[1];\n}\n}\n",
        "race|uninitialised",
        _MLA,
    ),
    Mutation(
        "latent: no barrier before the output",
        "latent.metal",
        "= peak[i];\n}\n}\n}\n}\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n",
        "= peak[i];\n}\n}\n}\n}\n",
        "race|uninitialised",
        _MLA,
    ),
    Mutation(
        "latent: the part of one simdgroup left out",
        "latent.metal",
        "s < SIMDGROUPS; s++",
        "s < SIMDGROUPS - 1; s++",
        "wrong",
        _MLA,
    ),
    Mutation(
        "latent: rope term scaled too",
        "latent.metal",
        "part *= scale;\n#if HAS_ROPE",
        "#if HAS_ROPE",
        "wrong",
        _MLA,
    ),
    Mutation(
        "latent: rope queries of one row for two",
        "latent.metal",
        "rope_query[row[1] * ROPE_DIM]",
        "rope_query[row[0] * ROPE_DIM]",
        "wrong",
        _MLA,
    ),
    Mutation(
        "latent: rope keys beyond the last",
        "latent.metal",
        "min(tile + 8 * k + at.row, count - 1) - begin",
        "tile + 8 * k + at.row - begin",
        "slice|out-of-bounds",
        _MLA,
    ),
    Mutation(
        "latent: the next tile is this one",
        "latent.metal",
        "key_row = offsets_ahead(key_row, TILE,",
        "key_row = offsets_ahead(key_row, 0,",
        "wrong",
        _MLA,
    ),
    Mutation(
        "latent: halves of a run exchanged",
        "latent.metal",
        "weight, vec<Number, 2>(numbers[k][e], numbers[k][HALF_RUN + e])",
        "weight, vec<Number, 2>(numbers[k][HALF_RUN + e], numbers[k][e])",
        "wrong",
        _MLA,
    ),
    Mutation(
        "latent: queries in another order",
        "latent.metal",
        "HALF_RUN * (8 * simd_gid + at.row)",
        "HALF_RUN * (8 * simd_gid + (at.row ^ 1))",
        "wrong",
        _MLA,
    ),
    Mutation(
        "latent: keys beyond the last count",
        "latent.metal",
        "bool visible = key < end;",
        "bool visible = true;",
        "wrong",
        _MLA,
    ),
    Mutation(
        "latent: mask of one row for two",
        "latent.metal",
        "at.column + i, row_count - 1);\nposition[i]",
        "at.column, row_count - 1);\nposition[i]",
        "wrong",
        _MLA_MASK,
    ),
    Mutation(
        "latent: output not rescaled",
        "latent.metal",
        "out[r * FRAGMENTS + e] *= decay;",
        "",
        "wrong",
        _MLA,
        steepness=8,
    ),
    Mutation(
        "latent: running sum not rescaled",
        "latent.metal",
        "total[i] *= decay[i];",
        "",
        "wrong",
        _MLA,
        steepness=8,
    ),
    Mutation(
        "latent: peak of some of the keys",
        "latent.metal",
        "highest = column_max(highest);",
        "",
        "wrong|race",
        _MLA,
        steepness=8,
    ),
    Mutation(
        "latent: weights of one share of the keys",
        "latent.metal",
        "if (k % SHARES == share) {",
        "if (k % SHARES == 0) {",
        "race|uninitialised|wrong",
        _MLA,
    ),
    Mutation(
        "latent: total of one share of the keys",
        "latent.metal",
        "s < SHARES; s++",
        "s < 1; s++",
        "wrong",
        _MLA,
    ),
    Mutation(
        "latent: sum over the wrong lanes",
        "fragments.metal",
        "x += simd_shuffle_xor(x, ushort(4));",
        "x += simd_shuffle_xor(x, ushort(8));",
        "wrong",
        _MLA,
    ),
    Mutation(
        "latent: sink left out",
        "latent.metal",
        "sum = sum * factor + fast::exp(sink - common);",
        "sum *= factor;",
        "wrong",
        _MLA_MASK,
    ),
    Mutation(
        "latent: rows past the last are stored",
        "latent.metal",
        "if (row >= row_count) {",
        "if (false) {",
        "stored by two|out-of-bounds",
        _MLA,
    ),
    Mutation("sink left out of the merge", "merge.metal", "total += fast::exp(sink - peak);", "", "wrong"),
    Mutation(
        "merge reads a split too many",
        "merge.metal",
        "s < splits; s++",
        "s <= splits; s++",
        "uninitialised|out-of-bounds",
    ),
    Mutation("no barrier in the merge", "merge.metal", _BARRIER, "", "race"),
    Mutation("merge weights of another row", "merge.metal", "stats + 2 * row * splits", "stats + 2 * splits", "wrong"),
    Mutation(
        "a pointer without an address space",
        "merge.metal",
        "const auto row_stats",
        "const float* row_stats",
        "compile|missing address space",
    ),
    Mutation(
        "more threadgroup memory than there is",
        "matrix.metal",
        "constexpr int UNITS = 2 / VALUE_PACKS;",
        "constexpr int UNITS = 16;",
        "exceeds the 32768-byte limit",
    ),
)


def caught_by(mutation: Mutation, backend: EmulatedBackend) -> str:
    """The emulator's message, or ``wrong result`` with the error; empty if nothing is found."""
    read = sources._read

    def mutated(name: str) -> str:
        text = read(name)
        if name != mutation.file:
            return text
        assert mutation.old in text, f"'{mutation.name}': nothing to mutate in {name}"
        return text.replace(mutation.old, mutation.new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_read", mutated)
        patch.setattr(sources, "decode_header", sources.decode_header.__wrapped__)
        call = cases.build(mutation.case)
        call = replace(call, scale=mutation.steepness * call.scale)
        tolerance = cases.TOLERANCES[mutation.case.dtype]
        return _run(call, 256, tolerance, backend) or _run(call, 32, tolerance, backend)


def _run(call: AttentionCall, keys_per_split: int, tolerance: float, backend: EmulatedBackend) -> str:
    try:
        output = backend.attend(call, keys_per_split)
    except MetalError as error:
        return " ".join(str(error).split())
    error_size = cases.relative_error(output, cases.expected(call))
    return f"wrong result, error {error_size:.1e}" if error_size > tolerance else ""


def main() -> None:
    for mutation in MUTATIONS:
        with emulated_backend() as backend:
            message = caught_by(mutation, backend) or "NOT CAUGHT"
        print(f"| {mutation.name} | {message[:110]} |", flush=True)
    for row_mutation in ROW_MUTATIONS:
        message = row_mutation_caught_by(row_mutation) or "NOT CAUGHT"
        print(f"| rows: {row_mutation.name} | {message[:110]} |", flush=True)


if __name__ == "__main__":
    main()
