"""Launch plans of the decode kernel: what it is specialized on, its shared memory, and how the keys are split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.cuda.device import DeviceLimits
from qsdpa_patch.kernels.cuda.planning import Unsupported, check_limits, ideal_splits
from qsdpa_patch.kernels.format import Format

__all__ = ["DecodePlan", "code_pitch", "decode_plan", "merged_splits"]

PART = 16
"""Keys that are the rows of one matrix operand; a tile is one, two or four such parts."""
_MOST_SPLITS = 1023
"""What the counter of a tile counts up to (``COUNT`` in ``decode_merge.cuh``)."""
_MOST_ROW_BLOCKS = 4
_ACCUMULATORS = 512
"""Blocks of 8 query rows times value dimensions that the registers of a warp hold: more takes a team of warps."""
_ACCUMULATORS_ALONE = 256
"""The same for a warp by itself, from where on two blocks, each for half of the rows, are faster than one."""
_LAYOUTS = ((16, 4, 2), (16, 2, 2), (8, 4, 2), (8, 2, 4), (8, 1, 6), (4, 1, 6), (2, 1, 6))
"""Warps of a block, parts of a tile and the most stages of its ring: the first that fits is taken.

One block to a multiprocessor, with all of its registers and shared memory, beat smaller blocks on an H200 for nearly
all shapes. Sixteen warps and tiles of four parts are for rows and dimensions that few registers hold.
"""
_FEWEST_TEAMS = 4
"""Teams of a block that get a tile before there are more blocks: fewer make more to merge, more share instructions."""
_LIGHT = 128
"""Blocks of 8 query rows over dimensions up to which a thread does with 128 registers."""


@dataclass(frozen=True)
class DecodePlan:
    """How calls of one signature run.

    rows: query rows that a thread block serves, 4 or a multiple of 8; row_tiles: how many such tiles a KV head has.
    warps, stages, parts: of a thread block, tiles of a team's ring, and sixteens of keys of a tile.
    team: warps that share a tile, each with a part of the dimensions.
    shared_bytes: dynamic shared memory of a thread block. ideal_splits: blocks along many keys.
    blocks_at_once: thread blocks that the device has room for.
    """

    signature: Signature
    rows: int
    row_tiles: int
    warps: int
    stages: int
    parts: int
    team: int
    shared_bytes: int
    ideal_splits: int
    blocks_at_once: int

    @property
    def threads(self) -> int:
        return self.warps * 32

    keys_to_check = 40
    """Keys of the check at first use."""

    def splits(self, count: int) -> int:
        """Thread blocks along ``count`` keys: the ideal number, or fewer where not even a few teams get a tile."""
        tiles = -(-count // (PART * self.parts))
        return max(1, min(self.ideal_splits, -(-tiles // min(self.warps // self.team, _FEWEST_TEAMS))))


@lru_cache(maxsize=512)
def decode_plan(sig: Signature, limits: DeviceLimits) -> DecodePlan:
    """The plan for ``sig``.

    Raises:
        Unsupported: with the reason.
    """
    check_limits(sig)
    rows = sig.query_heads // sig.kv_heads * sig.query_length
    terms = 2 if sig.dtype == mx.float32 else 1
    row_blocks = -(-rows // 8)
    team = _team(sig, min(row_blocks, _MOST_ROW_BLOCKS) * terms)
    held = _ACCUMULATORS * team if team > 1 else _ACCUMULATORS_ALONE
    most = max(1, min(_MOST_ROW_BLOCKS, held // (sig.value_dim * terms)))
    for row_tiles in sorted({-(-row_blocks // n) for n in range(1, most + 1)}):
        plan = _fitting_plan(sig, limits, 4 if rows <= 4 else -(-row_blocks // row_tiles) * 8, row_tiles, team)
        if plan is not None:
            return plan
    raise Unsupported(f"a tile of {sig.key_dim} + {sig.value_dim} dimensions does not fit into shared memory")


def _fitting_plan(sig: Signature, limits: DeviceLimits, rows: int, row_tiles: int, team: int) -> DecodePlan | None:
    """The plan with the best layout that shared memory has room for."""
    terms = 2 if sig.dtype == mx.float32 else 1
    light = -(-rows // 8) * terms * max(sig.key_dim, sig.value_dim) <= _LIGHT
    for warps, parts, most_stages in _LAYOUTS:
        if not light and (warps > 8 or parts > 2):
            continue
        for stages in range(most_stages, 1, -1):
            shared = shared_bytes(sig, rows, warps, stages, parts, team)
            if shared <= limits.shared_per_block and warps >= team:
                splits = merged_splits(sig.batch * sig.kv_heads * row_tiles, limits)
                at_once = limits.multiprocessors
                return DecodePlan(sig, rows, row_tiles, warps, stages, parts, team, shared, splits, at_once)
    return None


def merged_splits(tiles: int, limits: DeviceLimits) -> int:
    """The ideal number of splits of each of ``tiles`` tiles of rows, as far as the merge can count."""
    return min(ideal_splits(tiles, limits.multiprocessors), _MOST_SPLITS)


def _team(sig: Signature, row_blocks: int) -> int:
    """Warps of a team: the fewest (of 1, 2, 4) whose registers hold ``row_blocks`` of accumulators, or the most."""
    team = 1
    while team < 4 and row_blocks * sig.value_dim > _ACCUMULATORS * team and _divides(sig, 2 * team):
        team *= 2
    return team


def _divides(sig: Signature, team: int) -> bool:
    """Whether ``team`` warps can share the dimensions, in whole blocks of 32 and whole groups."""
    return all(dim % (team * max(32, format.group_size)) == 0 for format, dim in _halves(sig))


def _halves(sig: Signature) -> tuple[tuple[Format, int], tuple[Format, int]]:
    return (sig.key_format, sig.key_dim), (sig.value_format, sig.value_dim)


def shared_bytes(sig: Signature, rows: int, warps: int, stages: int, parts: int, team: int) -> int:
    """Shared memory of a block: the sum that ``decode_config.cuh`` makes (and is checked against)."""
    size = sig.dtype.size
    terms = 2 if size == 4 else 1
    row_blocks = -(-rows // 8)
    tile = PART * parts
    key_pitch, value_pitch = (code_pitch(f, d) for f, d in _halves(sig))
    key_scales = tile * sig.key_format.groups(sig.key_dim) * sig.key_scale_dtype.size
    value_scales = tile * sig.value_format.groups(sig.value_dim) * sig.value_scale_dtype.size
    stage = tile * key_pitch
    stage += key_scales * (2 if sig.key_format.has_biases else 1)
    if not sig.shared_kv:
        stage += tile * value_pitch
        stage += value_scales * (2 if sig.value_format.has_biases else 1)
    if sig.rope_dim:
        stage += tile * _pitch(sig.rope_dim * size)
    stage = -(-stage // 128) * 128
    teams = max(1, warps // team)
    out = teams * rows * (sig.value_dim + 4) * 4
    total = max(teams * stages * stage, out) + 16 + terms * rows * (sig.key_dim + 32) * 2
    in_bytes = terms == 1 and sig.key_format.mode in ("affine", "mxfp4")
    if sig.key_dim // team * row_blocks * terms > 256 and not in_bytes:
        total += terms * row_blocks * 8 * sig.key_dim * 2
    if sig.rope_dim:
        total += rows * (sig.rope_dim + 16 // size) * size
    if sig.key_format.has_biases or in_bytes:
        total += sig.key_format.groups(sig.key_dim) * rows * 4
    total += rows * 4 + teams * rows * 8 + 640
    return total + (warps * parts * rows * 64 if team > 1 else 0)


def code_pitch(format: Format, dim: int) -> int:
    """Bytes between rows of codes in a tile (``RowTile`` in ``tiles.cuh``)."""
    row_bytes = format.words(dim) * 4
    as_matrices = format.bits in (4, 8) or (format.bits == 2 and format.group_size >= 64)
    swizzled = as_matrices and row_bytes >= 32 and row_bytes & (row_bytes - 1) == 0
    return row_bytes if swizzled else _pitch(row_bytes)


def _pitch(row_bytes: int) -> int:
    """Bytes between rows of a tile that are not swizzled: an odd number of 16-byte units where rows are whole units."""
    return row_bytes if row_bytes % 16 else (row_bytes // 16 | 1) * 16
