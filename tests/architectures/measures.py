"""How far logits are apart."""

from __future__ import annotations

import mlx.core as mx

__all__ = ["deviations", "median", "quantile"]


def deviations(logits: mx.array, expected: mx.array) -> mx.array:
    """``[positions]``: the distance of two rows of logits over the spread of the expected ones."""
    spread = expected - expected.mean(axis=-1, keepdims=True)
    return mx.linalg.norm(logits - expected, axis=-1) / mx.linalg.norm(spread, axis=-1)


def median(x: mx.array) -> float:
    """The middle one of the numbers of a vector, of two the larger."""
    return quantile(x, 0.5)


def quantile(x: mx.array, share: float) -> float:
    """The number of a vector that ``share`` of the others are below."""
    return float(mx.sort(x)[int(x.size * share)])
