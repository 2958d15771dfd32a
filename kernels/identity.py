"""A cache for functions of one object, by its identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["cached_by_identity"]

X = TypeVar("X")
Y = TypeVar("Y")


def cached_by_identity(function: Callable[[X], Y]) -> Callable[[X], Y]:
    """``function``, called once for each object, which is kept alive.

    For what is asked at every step about the same few objects, where a hash would go through all that is in them.
    """
    known: dict[int, tuple[X, Y]] = {}

    def cached(x: X) -> Y:
        found = known.get(id(x))
        if found is None:
            found = known[id(x)] = x, function(x)
        return found[1]

    return cached
