"""Counters in device memory, by which the thread blocks of a launch learn which of them is the last.

A kernel leaves its counters at zero, as it found them. Two launches that may run at once must not share any, so arrays
of them are handed out in turn, to each thread its own. When the turn comes round, the launch that had an array is long
over: MLX has at most some thousand operations of a thread under way (ten graphs of a hundred), one graph after another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import mlx.core as mx

__all__ = ["start", "take_tickets", "ticket_size"]

start: Callable[..., None] = mx.async_eval
"""Evaluate arrays without waiting for them."""

_FEWEST = 256
"""Counters of an array, at least."""
_ARRAYS = 4096
_AT_A_TIME = 128


class _Turns:
    """Arrays of ``size`` counters, in turn: new ones for as long as there are fewer than ``_ARRAYS``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.waiting: list[mx.array] = []  # the next is the last
        self.taken: list[mx.array] = []

    def next(self) -> mx.array:
        if not self.waiting:
            if len(self.taken) < _ARRAYS:
                self.waiting = self._new()
            else:
                self.waiting, self.taken = self.taken[::-1], []
        array = self.waiting.pop()
        self.taken.append(array)
        return array

    def _new(self) -> list[mx.array]:
        arrays = list(mx.split(mx.zeros((_AT_A_TIME * self.size,), dtype=mx.uint32), _AT_A_TIME))
        start(*arrays)
        return arrays


class _Thread(threading.local):
    """A thread's turns, by the size of their arrays."""

    def __init__(self) -> None:
        self.turns: dict[int, _Turns] = {}


_thread = _Thread()


def ticket_size(count: int) -> int:
    """Counters of the arrays that hold at least ``count``."""
    return max(_FEWEST, 1 << (count - 1).bit_length())


def take_tickets(size: int) -> mx.array:
    """``size`` (of :func:`ticket_size`) counters at zero, that no launch under way has."""
    turns = _thread.turns.get(size)
    if turns is None:
        turns = _thread.turns[size] = _Turns(size)
    return turns.next()
