"""What the launch plans of the CUDA kernels share."""

from __future__ import annotations

from qsdpa_patch.kernels.attention_call import Signature

__all__ = ["MAX_QUERY_LENGTH", "Unsupported", "check_limits", "ideal_splits"]

MAX_QUERY_LENGTH = 16
"""Query positions up to which the kernels for decoding serve."""


class Unsupported(Exception):
    """No kernel takes this signature; the argument says why."""


def check_limits(sig: Signature) -> None:
    """Raise :class:`Unsupported` for what no kernel takes."""
    if sig.query_length > MAX_QUERY_LENGTH:
        raise Unsupported(f"query length {sig.query_length}: the fused kernel takes up to {MAX_QUERY_LENGTH}")
    for name, dim in (("key", sig.key_dim), ("value", sig.value_dim)):
        if dim % 32 or not 32 <= dim <= 512:
            raise Unsupported(f"{name} dimension {dim}: the fused kernel takes multiples of 32 from 32 to 512")
    if sig.rope_dim % 16 or sig.rope_dim > 128:
        raise Unsupported(f"rope dimension {sig.rope_dim}: the fused kernel takes multiples of 16 up to 128")


def ideal_splits(tiles: int, slots: int) -> int:
    """Thread blocks a tile of rows such that all blocks fill whole waves of the device's ``slots``."""
    if tiles <= slots // 2:
        return slots // tiles
    return min(range(1, 9), key=lambda s: (-(-tiles * s // slots) / s * (1 + 0.01 * s), s))
