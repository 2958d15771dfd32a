"""The rope term of absorbed MLA, taken from the lazy scores of the model's own code.

A model with absorbed MLA computes ``(q_rope * scale) @ k_rope.swapaxes(-1, -2)`` and passes the product as an additive
mask. Python tries the reflected operator of a subclass first, so that ``k_rope`` of class :class:`RopeKeys` sees both
factors: the product is the real one, lazy, and remembers them (:class:`RopeScores`). A fused kernel takes the factors
and the product is never evaluated; anything else that touches it gets plain scores.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

__all__ = ["RopeKeys", "RopeScores"]


class RopeKeys(mx.array):
    """Rope keys ``[B, 1, N, R]`` as a latent cache hands them out."""

    def __init__(self, keys: mx.array) -> None:
        super().__init__(keys)
        self.plain = keys

    def swapaxes(self, axis1: int, axis2: int, **stream: Any) -> mx.array:
        """As the array's; of the last two axes, one that remembers the keys."""
        swapped = self.plain.swapaxes(axis1, axis2, **stream)
        if {axis1 % self.ndim, axis2 % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            return swapped
        return _SwappedRopeKeys(swapped, self.plain)


class _SwappedRopeKeys(mx.array):
    """``[B, 1, R, N]``."""

    def __init__(self, swapped: mx.array, keys: mx.array) -> None:
        super().__init__(swapped)
        self.swapped = swapped
        self.keys = keys

    def __rmatmul__(self, queries: mx.array) -> mx.array:
        return RopeScores(queries @ self.swapped, queries, self.keys)


class RopeScores(mx.array):
    """Scores ``[B, Hq, L, N]`` of the rope part that remember ``queries @ keys^T``."""

    def __init__(self, scores: mx.array, queries: mx.array, keys: mx.array) -> None:
        super().__init__(scores)
        self.queries = queries
        self.keys = keys
