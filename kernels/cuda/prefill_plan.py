"""Launch plans of the kernel for many query rows on Hopper's tensor cores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.cuda.device import DeviceLimits
from qsdpa_patch.kernels.cuda.plan import MAX_QUERY_LENGTH, Unsupported
from qsdpa_patch.kernels.cuda.warpgroups import TILE, check_warpgroup_operands

__all__ = ["CHECKED_LENGTH", "PrefillPlan", "prefill_plan"]

ROWS = 128
"""Query rows of a thread block: 64 for each of two groups of consumers."""
_DIM = 256
"""Of keys and values: MLX has no fused attention for it on CUDA, and one warpgroup holds an output row of it."""
_STAGES = 2
CHECKED_LENGTH = 45
"""Query positions of the check at first use."""


@dataclass(frozen=True)
class PrefillPlan:
    """How calls of one signature run.

    row_tiles: tiles of 128 query rows (positions times heads of a group). shared_bytes: dynamic shared memory of a
    thread block.
    """

    signature: Signature
    row_tiles: int
    shared_bytes: int

    threads = 384
    rows = ROWS
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
    if (sig.key_dim, sig.value_dim, sig.rope_dim) != (_DIM, _DIM, 0):
        raise Unsupported(
            f"{sig.query_length} query rows of {sig.key_dim} dimensions against values of {sig.value_dim}: the fused "
            f"kernel for more than {MAX_QUERY_LENGTH} takes {_DIM} and {_DIM}, without a rope term"
        )
    check_warpgroup_operands(sig, limits)
    shared = 2 * (_STAGES + _STAGES) * TILE * _DIM + 2 * 2 * TILE * _DIM + 4 * 8 * _STAGES
    if shared > limits.shared_per_block:
        raise Unsupported(f"tiles of {_DIM} dimensions do not fit into shared memory")
    rows = sig.query_heads // sig.kv_heads * sig.query_length
    return PrefillPlan(sig, -(-rows // ROWS), shared)
