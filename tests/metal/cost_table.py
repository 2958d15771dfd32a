"""What a decode step costs on the Metal kernels, counted: beside MLX's own kernels for 16-bit keys.

    python -m tests.metal.cost_table

Per number of K and V (a head dim of one key of one key head) and for all of its query heads together:

- memory: bytes read of packed K and V over the packed bytes, each once for four threadgroups in a row, which run at
  the same time and share the GPU's cache; bytes: once a threadgroup; reads: once an access, of which a threadgroup may
  make several to the same byte;
- unpack (shifts, masks and conversions), float, integer (of addresses and bounds) and exp: instructions by kind
  (``emulator/instructions.py``); matrix: multiply-adds of 8x8 products, of which one simdgroup instruction has 512;
- cycles: of a lane, for all of these and the SIMD-group functions, by :data:`CYCLES`. Loads, stores and barriers are
  not in it, nor is waiting;
- reductions: SIMD-group reductions and exchanges per key and query head; barriers of a threadgroup, all in all;
- shared: bytes of threadgroup memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.format import Format
from tests import attention_cases as cases
from tests.attention_cases import Case
from tests.metal import mlx_attention
from tests.metal.append_cost import dispatches_of_caches
from tests.metal.emulated_backend import emulated_backend
from tests.metal.emulator import Cost

__all__ = ["MLA_SHAPES", "MLX_DIMS", "SHAPES", "Row", "measure", "measure_mlx", "read_of_splits"]

COUNT = 512
SHAPES = [(bits, group, dim) for bits in (4, 8) for dim in (64, 128, 256, 512) for group in (1, 4, 8, 16)]
"""Bits, query heads to a key head, and head dim, of the decode steps in the table."""
MLA_SHAPES = [(16, 256), (128, 256), (16, 512), (32, 512), (64, 512), (128, 512)]
"""Heads and latent."""
MLX_DIMS = (64, 128, 256)
"""Head dims that MLX's float kernels take."""

CYCLES = {
    "shift": 4, "bitwise": 1, "convert": 4, "add": 1, "multiply": 4, "multiply 64": 16, "select": 1, "float": 1,
    "widen": 0, "exp": 5,
}  # fmt: skip
"""Cycles of an instruction on an M1 or M2, as measured in https://github.com/philipturner/metal-benchmarks. An operand
of 16 bits costs nothing."""
MATRIX_CYCLES, REDUCTION_CYCLES, EXCHANGE_CYCLES = 20.1, 14.5, 2
"""Of SIMD-group functions, likewise: an 8x8 product, a sum or extremum over all lanes, a shuffle."""
DEVICES = {"M2 Ultra (76 cores)": (800e9, 13.6e12), "M4 (10 cores)": (120e9, 2.1e12)}
"""Memory bandwidth in bytes, and cycles of all lanes, per second: Apple's figures, half of the stated FLOP/s."""
STEPS = [  # query heads, key heads, head dim, keys
    (32, 8, 128, 8192), (32, 8, 128, 131072), (32, 4, 128, 32768), (32, 2, 256, 131072), (32, 32, 128, 8192),
]  # fmt: skip
MLA_STEPS = [(16, 32768), (128, 32768)]  # heads, keys; a latent of 512


@dataclass(frozen=True)
class Row:
    """One line of the table; see the module."""

    name: str
    memory_ratio: float
    bytes_ratio: float
    reads: float
    unpack: float
    float_ops: float
    integer: float
    exp: float
    matrix: float
    cycles: float
    reductions: float
    barriers: float
    threadgroup_memory: int

    def __str__(self) -> str:
        counts = [
            f"{self.memory_ratio:6.3f}",
            f"{self.bytes_ratio:5.3f}",
            f"{self.reads:5.2f}",
            f"{self.unpack:6.2f}",
            f"{self.float_ops:6.2f}",
            f"{self.integer:7.2f}",
            f"{self.exp:5.3f}",
            f"{self.matrix:6.1f}",
            f"{self.cycles:6.1f}",
            f"{self.reductions:10.3f}",
            f"{self.barriers:8.0f}",
            f"{self.threadgroup_memory:6}",
        ]
        return f"| {self.name:34} | {' | '.join(counts)} |"


HEADER = (
    f"| {'decode step':34} | memory | bytes | reads | unpack | float  | integer | exp   | matrix | cycles | reductions "
    f"| barriers | shared |\n"
    f"|{'-' * 36}|{'|'.join('-' * (n + 1) + ':' for n in (6, 5, 5, 6, 6, 7, 5, 6, 6, 10, 8, 6))}|"
)


def decode_case(bits: int, group: int, dim: int) -> Case:
    """One token over :data:`COUNT` keys in float16, stored as a cache stores them."""
    fmt = Format.affine(bits, 64)
    return Case(
        seed=1, kv_heads=1, group=group, count=COUNT, capacity=COUNT, key_dim=dim, value_dim=dim, dtype=mx.float16,
        key_format=fmt, value_format=fmt, stacked=True,
    )  # fmt: skip


def mla_case(bits: int, heads: int, latent: int = 512) -> Case:
    """One token of absorbed MLA: one latent for keys and values, and a rope term of 64 dims."""
    fmt = Format.affine(bits, 64)
    return Case(
        seed=1, kv_heads=1, group=heads, count=COUNT, capacity=COUNT, key_dim=latent, value_dim=latent,
        dtype=mx.float16, key_format=fmt, value_format=fmt, rope_dim=64,
    )  # fmt: skip


def measure(case: Case) -> Row:
    """The cost of ``case`` on our kernels, in a single launch."""
    call = cases.build(case)
    with emulated_backend() as backend:
        backend.attend(call, keys_per_split=COUNT)
    with emulated_backend(count_instructions=True) as counting:
        counting.attend(call, keys_per_split=COUNT)
    kind = "MLA" if case.is_mla else "GQA"
    numbers = case.count * (case.key_dim if case.is_mla else case.key_dim + case.value_dim)
    name = f"{kind} {case.group}, D {case.key_dim}, {case.key_format}"
    return _row(name, backend.costs[0], counting.costs[0], *_packed(call), numbers, case.group)


def read_of_splits(case: Case, splits: int) -> tuple[float, float]:
    """Bytes read over the packed bytes, in as many splits: from memory, and by threadgroups (see the module)."""
    call = cases.build(case)
    with emulated_backend() as backend:
        backend.attend(call, keys_per_split=COUNT // splits)
    attention, _ = backend.costs
    parts, packed = _packed(call)
    read = [attention.buffers[p] for p in parts]
    return sum(b.neighbour_unique_bytes for b in read) / packed, sum(b.threadgroup_unique_bytes for b in read) / packed


def _packed(call: AttentionCall) -> tuple[tuple[str, ...], int]:
    """Names of the buffers that keys and values are in, and their bytes."""
    if call.rope is None:
        return ("codes", "scales"), call.keys.packed_nbytes + call.values.packed_nbytes
    return ("key_codes", "key_scales", "key_biases", "rope_keys"), call.keys.packed_nbytes + call.rope.keys.nbytes


def measure_mlx(group: int, dim: int) -> Row:
    """The cost of the same step on MLX's kernel for float16 keys: that for grouped heads where MLX would take it."""
    problem = mlx_attention.Problem(mx.float16, dim, group, kv_heads=1, count=COUNT)
    shared = group % 2 == 0 and dim <= 256 and group * 2 * dim * 4 < 32_000
    kernel = "two passes, shared keys" if shared else "two passes"
    _, traced = mlx_attention.attend(problem, kernel)
    _, counted = mlx_attention.attend(problem, kernel, count_instructions=True)
    numbers = 2 * COUNT * dim
    name = f"MLX float16, GQA {group}, D {dim}{', gqa' if shared else ''}"
    return _row(name, traced[0], counted[0], ("keys", "values"), 2 * numbers, numbers, group)


def _row(name: str, traced: Cost, counted: Cost, parts: tuple[str, ...], packed: int, numbers: int, heads: int) -> Row:
    read = [traced.buffers[p] for p in parts]
    kinds = {kind: count / numbers for kind, count in counted.instructions.items()}
    reductions = sum(traced.ops.get(op, 0) for op in ("sum", "max", "min", "product"))
    products = traced.ops.get("matrix", 0)
    exchanges = traced.simd_reductions - reductions
    of_simdgroups = products * MATRIX_CYCLES + reductions * REDUCTION_CYCLES + exchanges * EXCHANGE_CYCLES
    return Row(
        name,
        memory_ratio=sum(b.neighbour_unique_bytes for b in read) / packed,
        bytes_ratio=sum(b.threadgroup_unique_bytes for b in read) / packed,
        reads=sum(b.load_bytes for b in read) / packed,
        unpack=kinds["shift"] + kinds["bitwise"] + kinds["convert"],
        float_ops=kinds["float"],
        integer=kinds["add"] + kinds["multiply"] + kinds["multiply 64"] + kinds["select"],
        exp=kinds["exp"],
        matrix=products * 512 / numbers,
        cycles=sum(CYCLES[kind] * count for kind, count in kinds.items()) + 32 * of_simdgroups / numbers,
        reductions=traced.simd_reductions / (COUNT * heads),
        barriers=traced.threadgroup_barriers / traced.threadgroups,
        threadgroup_memory=traced.threadgroup_memory_bytes,
    )


def rows() -> Iterator[Row]:
    for bits, group, dim in SHAPES:
        yield measure(decode_case(bits, group, dim))
    for bits in (4, 8):
        for heads, latent in MLA_SHAPES:
            yield measure(mla_case(bits, heads, latent))
    for dim in MLX_DIMS:
        for group in (1, 4, 8, 16):
            yield measure_mlx(group, dim)


def expected_times() -> Iterator[str]:
    """Estimates of decode steps in float16 at 4 bits, and of MLX's kernels for float16 keys."""
    columns = "MB | read, µs | compute, µs | expected, µs"
    yield f"| decode step, 4-bit g64 | device | {columns} | MLX float16: {columns} |"
    yield f"|---|---|{'--:|' * 8}"
    for heads, kv_heads, dim, count in STEPS:
        ours, theirs = measure(decode_case(4, heads // kv_heads, dim)), measure_mlx(heads // kv_heads, dim)
        numbers = 2 * kv_heads * dim * count
        for device in DEVICES:
            estimates = [
                _estimate(device, numbers, size, row) for size, row in ((numbers * 9 / 16, ours), (2 * numbers, theirs))
            ]
            yield f"| Hq {heads}, Hkv {kv_heads}, D {dim}, N {count} | {device} | {' | '.join(estimates)} |"
    for heads, count in MLA_STEPS:
        numbers = count * 512
        for device in DEVICES:
            estimate = _estimate(device, numbers, numbers * 9 / 16 + count * 64 * 2, measure(mla_case(4, heads)))
            yield f"| MLA, {heads} heads, latent 512, N {count} | {device} | {estimate} | | | | |"


def _estimate(device: str, numbers: int, size: float, row: Row) -> str:
    """MB, and µs to read them, to compute, and the larger of both: at the device's full rates."""
    bandwidth, rate = DEVICES[device]
    read, compute = size / bandwidth * 1e6, numbers * row.cycles / rate * 1e6
    return f"{size / 1e6:.1f} | {read:.0f} | {compute:.0f} | {max(read, compute):.0f}"


def appending() -> Iterator[str]:
    """Dispatches of an update of the cache with one token."""
    yield "| cache | dispatches | of these |"
    yield "|---|--:|---|"
    for name, counted in dispatches_of_caches():
        yield f"| {name} | {counted.total()} | {', '.join(f'{n} {what}' for what, n in sorted(counted.items()))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(f"One token over {COUNT} keys, mlx {version('mlx')}, counted in the emulator\n\n{HEADER}")
    for row in rows():
        print(row, flush=True)
    print()
    for line in expected_times():
        print(line, flush=True)
    print()
    for line in appending():
        print(line, flush=True)


if __name__ == "__main__":
    main()
