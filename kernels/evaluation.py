"""Evaluating arrays where that is possible."""

from __future__ import annotations

import mlx.core as mx

__all__ = ["evaluate_unless_traced"]


def evaluate_unless_traced(*arrays: mx.array) -> bool:
    """Evaluate ``arrays``; false under ``mx.compile`` or ``mx.vmap``, where MLX refuses and they stay lazy."""
    try:
        mx.eval(*arrays)
    except ValueError as error:
        if "function transformations" not in str(error):
            raise
        return False
    return True
