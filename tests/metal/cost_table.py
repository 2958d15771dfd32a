"""What a decode step costs on the Metal kernels, counted: beside MLX's own kernels for 16-bit keys.

    python -m tests.metal.cost_table

Per number of K and V (a head dim of one key of one key head) and for all of its query heads together:

- bytes: device bytes read of packed K and V, each byte once a threadgroup, over the packed bytes. MLX's kernels for
  float keys may read a byte several times in a threadgroup; that is counted in ``reads``;
- unpack, float, widen, exp: instructions by kind (``emulator/instructions.py``); matrix: multiply-adds of 8x8 products,
  of which one simdgroup instruction has 512;
- reductions: SIMD-group reductions and exchanges per key and query head; barriers of a threadgroup, all in all;
- shared: bytes of threadgroup memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx

from qsdpa_patch.kernels.format import Format
from tests import attention_cases as cases
from tests.attention_cases import Case
from tests.metal import mlx_attention
from tests.metal.append_cost import dispatches_of_caches
from tests.metal.emulated_backend import emulated_backend
from tests.metal.emulator import Cost

__all__ = ["SHAPES", "Row", "measure", "measure_mlx"]

COUNT = 512
SHAPES = [(bits, group, dim) for bits in (4, 8) for dim in (64, 128, 256, 512) for group in (1, 4, 8, 16)]
"""Bits, query heads to a key head, and head dim, of the decode steps in the table."""


DEVICES = {"M2 Ultra (76 cores)": (800e9, 13.6e12), "M4 (10 cores)": (120e9, 2.1e12)}
"""Memory bandwidth in bytes, and operations of all lanes, per second: Apple's figures, half of the stated FLOP/s."""
STEPS = [  # query heads, key heads, head dim, keys
    (32, 8, 128, 8192), (32, 8, 128, 131072), (32, 4, 128, 32768), (32, 2, 256, 131072), (32, 32, 128, 8192),
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table; see the module."""

    name: str
    bytes_ratio: float
    reads: float
    unpack: float
    float_ops: float
    widen: float
    exp: float
    matrix: float
    reductions: float
    barriers: float
    threadgroup_memory: int

    @property
    def lane_operations(self) -> float:
        """Everything a lane does with numbers, per number of K and V."""
        return self.unpack + self.float_ops + self.widen + self.exp + self.matrix

    def __str__(self) -> str:
        counts = [
            f"{self.bytes_ratio:5.3f}",
            f"{self.reads:5.2f}",
            f"{self.unpack:6.2f}",
            f"{self.float_ops:6.2f}",
            f"{self.widen:5.2f}",
            f"{self.exp:5.3f}",
            f"{self.matrix:6.1f}",
            f"{self.lane_operations:6.1f}",
            f"{self.reductions:10.3f}",
            f"{self.barriers:8.0f}",
            f"{self.threadgroup_memory:6}",
        ]
        return f"| {self.name:34} | {' | '.join(counts)} |"


HEADER = (
    f"| {'decode step':34} | bytes | reads | unpack | float  | widen | exp   | matrix | total  | reductions | barriers "
    f"| shared |\n|{'-' * 36}|{'|'.join('-' * (n + 1) + ':' for n in (5, 5, 6, 6, 5, 5, 6, 6, 10, 8, 6))}|"
)


def decode_case(bits: int, group: int, dim: int) -> Case:
    """One token over :data:`COUNT` keys in float16."""
    fmt = Format.affine(bits, 64)
    return Case(
        seed=1, kv_heads=1, group=group, count=COUNT, capacity=COUNT, key_dim=dim, value_dim=dim, dtype=mx.float16,
        key_format=fmt, value_format=fmt,
    )  # fmt: skip


def mla_case(bits: int, heads: int, latent: int = 512) -> Case:
    """One token of absorbed MLA: one latent for keys and values, and a rope term of 64 dims."""
    fmt = Format.affine(bits, 64)
    return Case(
        seed=1, kv_heads=1, group=heads, count=COUNT, capacity=COUNT, key_dim=latent, value_dim=latent,
        dtype=mx.float16, key_format=fmt, value_format=fmt, rope_dim=64,
    )  # fmt: skip


def measure(case: Case) -> Row:
    """The cost of ``case`` on our kernels."""
    call = cases.build(case)
    with emulated_backend() as backend:
        backend.attend(call, keys_per_split=COUNT)
    with emulated_backend(count_instructions=True) as counting:
        counting.attend(call, keys_per_split=COUNT)
    kind = "MLA" if case.is_mla else "GQA"
    parts = ("key_codes", "key_scales", "key_biases", "value_codes", "value_scales", "value_biases", "rope_keys")
    packed = call.keys.packed_nbytes + (call.rope.keys.nbytes if call.rope else call.values.packed_nbytes)
    numbers = case.count * (case.key_dim if case.is_mla else case.key_dim + case.value_dim)
    name = f"{kind} {case.group}, D {case.key_dim}, {case.key_format}"
    return _row(name, backend.costs[0], counting.costs[0], parts, packed, numbers, case.group)


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
    read = [traced.buffers[p] for p in parts if p in traced.buffers]
    kinds = {kind: count / numbers for kind, count in counted.instructions.items()}
    return Row(
        name,
        bytes_ratio=sum(b.threadgroup_unique_bytes for b in read) / packed,
        reads=sum(b.load_bytes for b in read) / packed,
        unpack=kinds["unpack"],
        float_ops=kinds["float"],
        widen=kinds["widen"],
        exp=kinds["exp"],
        matrix=traced.ops.get("matrix", 0) * 512 / numbers,
        reductions=traced.simd_reductions / (COUNT * heads),
        barriers=traced.threadgroup_barriers / traced.threadgroups,
        threadgroup_memory=traced.threadgroup_memory_bytes,
    )


def rows() -> Iterator[Row]:
    for bits, group, dim in SHAPES:
        yield measure(decode_case(bits, group, dim))
    for bits in (4, 8):
        for heads in (16, 32, 128):
            yield measure(mla_case(bits, heads))
    for dim in (64, 128, 256):
        for group in (1, 4, 8, 16):
            yield measure_mlx(group, dim)


def expected_times() -> Iterator[str]:
    """Estimates of a decode step in float16 at 4 bits: what reading and computing take at the device's full rates."""
    yield "| decode step, 4-bit g64 | device | MB | read, µs | compute, µs | expected, µs |"
    yield "|---|---|--:|--:|--:|--:|"
    for heads, kv_heads, dim, count in STEPS:
        row = measure(decode_case(4, heads // kv_heads, dim))
        numbers = 2 * kv_heads * dim * count
        size = numbers * 9 / 16
        for device, (bandwidth, rate) in DEVICES.items():
            read, compute = size / bandwidth * 1e6, numbers * row.lane_operations / rate * 1e6
            yield (
                f"| Hq {heads}, Hkv {kv_heads}, D {dim}, N {count} | {device} | {size / 1e6:.1f} | {read:.0f} "
                f"| {compute:.0f} | {max(read, compute):.0f} |"
            )


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
