"""Launch plans of the kernel for absorbed MLA on Hopper's tensor cores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.cuda.device import DeviceLimits
from qsdpa_patch.kernels.cuda.planning import Unsupported, check_limits, ideal_splits
from qsdpa_patch.kernels.cuda.warpgroups import TILE, check_warpgroup_operands

__all__ = ["MlaPlan", "mla_plan"]

ROWS = 64
"""Query rows of a thread block: what a matrix product of a warpgroup takes."""
_FEWEST_ROWS = 32
"""With fewer, most of the products would be of rows that are not there."""
_ROPE = 64
_MOST_STAGES = 4
_MOST_PARTS = 4
_SPLITS_OF_A_PART = 18
"""Splits that a thread of the merging kernel has under way at once: ``EACH`` of ``MlaMerger``."""


@dataclass(frozen=True)
class MlaPlan:
    """How calls of one signature run.

    row_tiles: tiles of 64 query rows of a sequence. stages: tiles of keys in shared memory. shared_bytes: dynamic
    shared memory of a thread block. ideal_splits: blocks along many keys.
    """

    signature: Signature
    row_tiles: int
    stages: int
    shared_bytes: int
    ideal_splits: int

    threads = 384
    rows = ROWS

    def splits(self, count: int) -> int:
        """Thread blocks along ``count`` keys: the ideal number, or fewer where one would get no tile."""
        return max(1, min(self.ideal_splits, -(-count // TILE)))

    @property
    def merge_parts(self) -> int:
        """Groups of threads that a block of the merging kernel deals the splits to."""
        return min(_MOST_PARTS, -(-self.ideal_splits // _SPLITS_OF_A_PART))

    @property
    def merge_threads(self) -> int:
        return 128 * self.merge_parts

    @property
    def keys_to_check(self) -> int:
        """Keys that make every block go through its ring of tiles, the last of them in part."""
        return TILE * self.ideal_splits * (self.stages + 1) - 7


@lru_cache(maxsize=512)
def mla_plan(sig: Signature, limits: DeviceLimits) -> MlaPlan:
    """The plan for ``sig``.

    Raises:
        Unsupported: with the reason.
    """
    check_limits(sig)
    rows = sig.query_heads * sig.query_length
    if not (sig.shared_kv and sig.kv_heads == 1 and sig.rope_dim == _ROPE and sig.key_dim in (256, 512)):
        raise Unsupported("not absorbed MLA with a latent of 256 or 512 and a rope term of 64 dimensions")
    if rows < _FEWEST_ROWS:
        raise Unsupported(f"{rows} query rows: warpgroup products pay from {_FEWEST_ROWS} on")
    check_warpgroup_operands(sig, limits)
    row_tiles = -(-rows // ROWS)
    for stages in range(_MOST_STAGES, 1, -1):
        shared = shared_bytes(sig, stages)
        if shared <= limits.shared_per_block:
            splits = ideal_splits(sig.batch * row_tiles, limits.multiprocessors)
            return MlaPlan(sig, row_tiles, stages, shared, splits)
    raise Unsupported(f"two tiles of {sig.key_dim} dimensions do not fit into shared memory")


def shared_bytes(sig: Signature, stages: int) -> int:
    """Shared memory of a block: the sum that ``mla_config.cuh`` makes (and is checked against)."""
    tile = TILE * (sig.key_dim + _ROPE) * 2
    probabilities, factors = TILE * ROWS * 2, 128 * 8
    return (stages + 1) * tile + probabilities + factors + 2 * 8 * stages
