"""Launch plans of the Metal kernels: what is compiled for a signature, and how a call is spread over threadgroups."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import Signature

__all__ = ["MAX_SPLITS", "Family", "Kind", "Launch", "core_count", "family_of", "plan_launch"]

MAX_SPLITS = 256
KEYS_PER_SPLIT = 256
"""A split has at least so many keys; up to twice as many are one split, and one launch."""
_THREADGROUPS_PER_CORE = 4
_FEW_ROWS = 4
_OUTPUT_REGISTERS = 64
"""Registers of a lane that hold sums of the output; what else a lane keeps takes about as many."""
_LATENT_REGISTERS = 80
"""Those and the dequantized numbers of the keys."""
_LATENT_ROW_TILES = 4
"""With 16 keys at a time: the parts of the scores take 4 KB of threadgroup memory for each tile of rows."""
_CORES = {"Ultra": 76, "Max": 40, "Pro": 18}
"""Cores by what a device's name has after "Apple M4"."""
_CORES_OF_OTHERS = 10


class Kind(Enum):
    """Which kernel, by the number of rows (query head, position) that share a key head, and the output's size."""

    FEW_ROWS = "few rows"  # up to 4, or 2 of long values: ordinary multiply-adds
    ALONE = "alone"  # matrix products, where a simdgroup can hold the whole output of its rows
    TEAM = "team"  # matrix products, with the output's dims shared out over the simdgroups
    LATENT = "latent"  # keys and values are one tensor (MLA), whose dims are shared out over the simdgroups


@dataclass(frozen=True)
class Family:
    """All that a compiled kernel depends on, apart from the dtypes of its inputs.

    A threadgroup takes ``rows`` rows of a key head; one of its ``simdgroups`` takes ``tile`` keys at a time.
    """

    signature: Signature  # without batch, heads and length, which are read from the shapes
    kind: Kind
    rows: int
    tile: int
    simdgroups: int


@dataclass(frozen=True)
class Launch:
    """How one call is spread: ``splits`` of the keys, and ``blocks`` of the rows of a key head."""

    splits: int
    blocks: int


@cache
def core_count() -> int:
    """GPU cores of this machine, about: Metal tells the device's name only."""
    if not mx.metal.is_available():
        return _CORES_OF_OTHERS
    name = str(mx.device_info(mx.gpu).get("device_name", ""))
    return next((cores for word, cores in _CORES.items() if word in name.split()), _CORES_OF_OTHERS)


@cache
def family_of(signature: Signature) -> Family:
    """The kernel for calls of ``signature``."""
    rows = signature.query_heads // signature.kv_heads * signature.query_length
    static = signature._replace(batch=0, query_heads=0, kv_heads=0, query_length=0)
    if rows * (2 if signature.value_dim > 256 else 1) <= _FEW_ROWS and not signature.rope_dim:
        return Family(static, Kind.FEW_ROWS, rows, tile=32, simdgroups=4)
    row_tiles, chunks = -(-rows // 8), signature.value_dim // 32
    if signature.shared_kv and signature.value_dim in (256, 512):
        return _latent_family(static, row_tiles)
    if row_tiles * chunks * 8 <= _OUTPUT_REGISTERS:
        return Family(static, Kind.ALONE, 8 * row_tiles, tile=8 * max(1, 4 // row_tiles), simdgroups=4)
    per_simdgroup = -(-chunks // 8)
    most = _OUTPUT_REGISTERS // (8 * per_simdgroup)
    if row_tiles > 2 * most:  # prefill: one kernel, whatever the number of rows
        row_tiles = most
    else:
        row_tiles = -(-row_tiles // -(-row_tiles // most))
    return Family(static, Kind.TEAM, 8 * row_tiles, 16 if row_tiles <= 2 else 8, -(-chunks // per_simdgroup))


def _latent_family(static: Signature, row_tiles: int) -> Family:
    """8 simdgroups, each with an eighth of the dims in its registers: of the output's rows, and of 8 or 16 keys."""
    packs = static.value_dim // 256
    most = _OUTPUT_REGISTERS // (8 * packs)
    row_tiles = -(-row_tiles // -(-row_tiles // most))
    of_two_tiles = 16 * packs // (2 if static.dtype == mx.float16 else 1)
    two = row_tiles <= _LATENT_ROW_TILES and 8 * packs * row_tiles + of_two_tiles <= _LATENT_REGISTERS
    return Family(static, Kind.LATENT, 8 * row_tiles, 16 if two else 8, simdgroups=8)


def plan_launch(signature: Signature, family: Family, count: int, cores: int) -> Launch:
    """The launch for a call with ``count`` keys: enough threadgroups to fill the device, none with too few keys."""
    blocks = -(-(signature.query_heads // signature.kv_heads * signature.query_length) // family.rows)
    threadgroups = signature.batch * signature.kv_heads * blocks
    wanted = -(-cores * _THREADGROUPS_PER_CORE // threadgroups)
    return Launch(max(1, min(wanted, count // KEYS_PER_SPLIT, MAX_SPLITS)), blocks)
