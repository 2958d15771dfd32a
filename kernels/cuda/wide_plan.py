"""Launch plans of the decode kernel with warpgroup products (``wide.cuh``), for more query rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.cuda.decode_plan import code_pitch, merged_splits
from qsdpa_patch.kernels.cuda.device import DeviceLimits
from qsdpa_patch.kernels.cuda.planning import Unsupported, check_limits
from qsdpa_patch.kernels.cuda.warpgroups import TILE, check_warpgroup_operands
from qsdpa_patch.kernels.format import Format

__all__ = ["WidePlan", "wide_plan"]

_PANEL = 64
"""Columns of an operand in shared memory, of 128 bytes."""
_MOST_ROWS = 32
_MOST_STAGES = 4
_DIMENSIONS = (128, 256)
_BITS = (2, 4, 8)
_LONGEST = 131072
"""Contexts of more keys are rare: no reason to compile a kernel for them alone."""


@dataclass(frozen=True)
class WidePlan:
    """How calls of one signature run.

    rows: query rows that a thread block serves, 16 or 32; row_tiles: how many such tiles a KV head has.
    teams, stages: warpgroups of a thread block, and tiles of a team's ring. shared_bytes: dynamic shared memory of a
    thread block. ideal_splits: blocks along many keys. blocks_at_once: thread blocks that the device has room for.
    fewest_keys: with fewer the general kernel is faster.
    """

    signature: Signature
    rows: int
    row_tiles: int
    teams: int
    stages: int
    shared_bytes: int
    ideal_splits: int
    blocks_at_once: int
    fewest_keys: int

    @property
    def threads(self) -> int:
        return self.teams * 128

    def splits(self, count: int) -> int:
        """Thread blocks along ``count`` keys: the ideal number, or fewer where a team would get no tile."""
        return max(1, min(self.ideal_splits, -(-count // (TILE * self.teams))))

    @property
    def keys_to_check(self) -> int:
        """Keys that make every team go through its ring of tiles, the last of them in part."""
        return TILE * self.teams * self.ideal_splits * (self.stages + 1) - 7


@lru_cache(maxsize=512)
def wide_plan(sig: Signature, limits: DeviceLimits) -> WidePlan:
    """The plan for ``sig``.

    Raises:
        Unsupported: with the reason; also where the general kernel is faster.
    """
    check_limits(sig)
    check_warpgroup_operands(sig, limits)
    _check_operands(sig)
    all_rows = sig.query_heads // sig.kv_heads * sig.query_length
    if all_rows <= _fewest_rows(sig):
        raise Unsupported(f"{all_rows} query rows: warpgroup products pay from {_fewest_rows(sig) + 1} on")
    rows = 16 if all_rows <= 16 else _MOST_ROWS
    row_tiles = -(-all_rows // rows)
    blocks = sig.batch * sig.kv_heads * row_tiles
    fewest_keys = _fewest_tiles(sig, rows) * TILE * limits.multiprocessors // blocks
    if fewest_keys > _LONGEST:
        raise Unsupported(f"warpgroup products pay from {fewest_keys} keys on")
    for teams, stages in _layouts(sig, rows):
        shared = shared_bytes(sig, rows, teams, stages)
        if shared <= limits.shared_per_block:
            splits = merged_splits(blocks, limits)
            at_once = limits.multiprocessors
            return WidePlan(sig, rows, row_tiles, teams, stages, shared, splits, at_once, fewest_keys)
    raise Unsupported(f"three tiles of {sig.key_dim} + {sig.value_dim} dimensions do not fit into shared memory")


def _check_operands(sig: Signature) -> None:
    """Raise :class:`Unsupported` for what the kernel does not take."""
    if sig.rope_dim or sig.shared_kv:
        raise Unsupported("rope terms and values that are the keys go to other kernels")
    for format, dim in ((sig.key_format, sig.key_dim), (sig.value_format, sig.value_dim)):
        if not format.is_affine or format.bits not in _BITS or format.group_size % _PANEL:
            raise Unsupported(f"{format}: warpgroup products take 2, 4 and 8 bits in groups of 64 or 128")
        if dim not in _DIMENSIONS or dim % format.group_size:
            raise Unsupported(f"dimension {dim}: warpgroup products take {_DIMENSIONS}, in whole groups")


def _fewest_rows(sig: Signature) -> int:
    """Rows up to which the general kernel was as fast on an H200: it wants many registers where values are wide."""
    return 8 if sig.value_dim > 128 else 16


def _fewest_tiles(sig: Signature, rows: int) -> int:
    """Tiles of a multiprocessor from which on the kernel was faster than the general one on an H200.

    It begins and ends later, by 1 to 4 microseconds, and gains on each tile: the most where the general kernel has to
    share its accumulators out to several warps.
    """
    if rows == 16:
        return 15
    if sig.value_dim > 128:
        return 0
    return 18 if min(sig.key_format.bits, sig.value_format.bits) == 8 else 32


def _layouts(sig: Signature, rows: int) -> list[tuple[int, int]]:
    """Teams of a block and stages of a ring, the best first.

    More teams hide more of each other's waits. Four leave a thread 128 registers, three 168, two 255: for the
    accumulators of all values, and for the codes and accumulators of a group of keys.
    """
    values = rows * sig.value_dim
    group = rows * min(sig.key_format.group_size, sig.key_dim)
    teams = 2 if values > 4096 else 3 if sig.value_dim > 128 or group > 2048 else 4
    return [(n, stages) for n in range(teams, 0, -1) for stages in range(_MOST_STAGES, 2, -1)]


def shared_bytes(sig: Signature, rows: int, teams: int, stages: int) -> int:
    """Shared memory of a block: the sum that ``wide_config.cuh`` makes (and is checked against)."""
    key_groups, value_groups = sig.key_format.groups(sig.key_dim), sig.value_format.groups(sig.value_dim)
    weights = 2 * teams * _panels(value_groups * rows) * TILE * 128
    queries = (_panels(sig.key_dim) + 1) * rows * 128
    ring = teams * stages * _stage_bytes(sig)
    totals = teams * (rows * (sig.value_dim + 4) + 4 * (value_groups + 1) * rows) * 4
    numbers = key_groups * rows + rows + 4 * teams * rows + 4 * teams * (rows + 4)
    return max(weights + queries + ring, totals) + 4 * numbers + 640


def _stage_bytes(sig: Signature) -> int:
    """Of a tile: codes, scales and biases of keys and values."""

    def half(format: Format, dim: int, scale_bytes: int) -> int:
        return code_pitch(format, dim) + format.groups(dim) * scale_bytes * (2 if format.has_biases else 1)

    row = half(sig.key_format, sig.key_dim, sig.key_scale_dtype.size)
    row += half(sig.value_format, sig.value_dim, sig.value_scale_dtype.size)
    return -(-TILE * row // 128) * 128


def _panels(columns: int) -> int:
    return -(-columns // _PANEL)
