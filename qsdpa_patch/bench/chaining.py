"""Runs of attention calls that cannot overlap: each takes the result of the one before as its queries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx

__all__ = ["SUBMITTED_TOGETHER", "chained", "submit"]

SUBMITTED_TOGETHER = 32
"""Calls after which the device sets to work on them while the host goes on, as with the layers of a token's step."""

submit: Callable[[Any], None] = mx.async_eval  # its stub has no types

S = TypeVar("S")


def chained(
    attend: Callable[[mx.array, S], mx.array], queries: mx.array, sets: Sequence[S]
) -> Callable[[int], mx.array]:
    """A :attr:`TimedPath.run` that calls ``attend(queries, set)``, going round ``sets``.

    The layers of a model depend on each other, so calls of a run must too: a GPU would otherwise overlap them.
    """
    rotation = itertools.cycle(sets)

    def run(calls: int) -> mx.array:
        # A new object, because mlx-lm's path scales its queries in place.
        out = attend(queries[:], next(rotation))
        for number in range(1, calls):
            if number % SUBMITTED_TOGETHER == 0:
                submit(out)
            out = attend(_as_queries(out, queries), next(rotation))
        return out

    return run


def _as_queries(out: mx.array, queries: mx.array) -> mx.array:
    return out if out.shape == queries.shape else queries + 0 * out[..., :1]
