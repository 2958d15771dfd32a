"""Counters in device memory, by which the thread blocks of a launch learn which of them is the last.

A kernel leaves its counters at zero, as it found them. Two launches that may run at once must not share any, so arrays
of them are handed out in turn, to each thread its own. When the turn comes round, the launch that had an array is long
over: MLX has at most some thousand operations of a thread under way (ten graphs of a hundred), one graph after another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import mlx.core as mx

__all__ = ["start", "take_tickets"]

start: Callable[..., None] = mx.async_eval
"""Evaluate arrays without waiting for them."""

_FEWEST = 256
"""Counters of an array, at least."""
_ARRAYS = 4096
_AT_A_TIME = 128


class _Turns(threading.local):
    """The arrays of a thread, in turn, by the number asked for."""

    def __init__(self) -> None:
        self.of_count: dict[int, Iterator[mx.array]] = {}


_turns = _Turns()


def take_tickets(count: int) -> mx.array:
    """At least ``count`` counters at zero, that no launch under way has."""
    turns = _turns.of_count.get(count)
    if turns is None:
        size = max(_FEWEST, 1 << (count - 1).bit_length())
        turns = _turns.of_count.setdefault(size, _in_turn(size))
        _turns.of_count[count] = turns
    return next(turns)


def _in_turn(size: int) -> Iterator[mx.array]:
    """Arrays of ``size`` counters: some more for as long as there are fewer than ``_ARRAYS``, then these for ever."""
    arrays: list[mx.array] = []
    while len(arrays) < _ARRAYS:
        more = mx.split(mx.zeros((_AT_A_TIME * size,), dtype=mx.uint32), _AT_A_TIME)
        start(*more)
        arrays += more
        yield from more
    while True:
        yield from arrays
