"""Launch plans of the kernel for many query rows on Hopper's tensor cores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.cuda.device import DeviceLimits
from qsdpa_patch.kernels.cuda.planning import MAX_QUERY_LENGTH, Unsupported
from qsdpa_patch.kernels.cuda.warpgroups import TILE, check_warpgroup_operands

__all__ = ["CHECKED_LENGTH", "PrefillPlan", "prefill_plan"]

_PANEL = 64
"""Columns of a tile that lie together in shared memory."""
_CONSUMER_ROWS = 64
"""Query rows of a product of a warpgroup; two warpgroups multiply."""
_MOST_COLUMNS = 256
"""Of an output row that the registers of one warpgroup hold; longer rows are shared by two."""
_STAGES = ((2, 2), (2, 1), (1, 1))
"""Tiles of keys and of values in shared memory: the first pair that fits is taken."""
CHECKED_LENGTH = 45
"""Query positions of the check at first use."""


@dataclass(frozen=True)
class PrefillPlan:
    """How calls of one signature run.

    rows: query rows (positions times heads of a group) of a thread block. row_tiles: thread blocks of a KV head.
    key_stages, value_stages: tiles of each in shared memory. shared_bytes: dynamic shared memory of a thread block.
    """

    signature: Signature
    rows: int
    row_tiles: int
    key_stages: int
    value_stages: int
    shared_bytes: int

    threads = 512
    keys_to_check = 5 * TILE - 7
    """Of the check at first use: several rounds of the rings, the last tile in part."""


@lru_cache(maxsize=512)
def prefill_plan(sig: Signature, limits: DeviceLimits) -> PrefillPlan:
    """The plan for ``sig``.

    Raises:
        Unsupported: with the reason.
    """
    if sig.query_length <= MAX_QUERY_LENGTH:
        raise Unsupported(f"query length {sig.query_length}: the kernel for decoding takes up to {MAX_QUERY_LENGTH}")
    if sig.rope_dim:
        raise Unsupported(f"a rope term with {sig.query_length} query rows: the fused kernel for so many takes none")
    for name, dim in (("key", sig.key_dim), ("value", sig.value_dim)):
        if dim % 32 or not 32 <= dim <= 512:
            raise Unsupported(f"{name} dimension {dim}: the fused kernel takes multiples of 32 from 32 to 512")
    check_warpgroup_operands(sig, limits)
    rows = _CONSUMER_ROWS * (2 if sig.value_dim <= _MOST_COLUMNS else 1)
    row_tiles = -(-(sig.query_heads // sig.kv_heads * sig.query_length) // rows)
    for stages in _STAGES:
        shared = shared_bytes(sig, rows, *stages)
        if shared <= limits.shared_per_block:
            return PrefillPlan(sig, rows, row_tiles, *stages, shared)
    raise Unsupported(f"tiles of {sig.key_dim} and {sig.value_dim} dimensions do not fit into shared memory")


def shared_bytes(sig: Signature, rows: int, key_stages: int, value_stages: int) -> int:
    """Shared memory of a block: the sum that ``PrefillConfig`` in ``prefill.cuh`` makes (and is checked against)."""
    panel = TILE * _PANEL * 2
    key_tile = -(-sig.key_dim // _PANEL) * panel
    sides = 2 * _CONSUMER_ROWS // rows
    value_tile = sides * -(-sig.value_dim // (sides * _PANEL)) * panel
    tiles = (key_stages + rows // TILE) * key_tile + value_stages * value_tile
    return tiles + 2 * 8 * (key_stages + value_stages)
