"""Counters in device memory, by which the thread blocks of a launch learn which of them is the last.

A kernel leaves its counters at zero, as it found them. Two launches that may run at once must not share any, so an
array of them is handed out once only; many are made at a time, which costs one small kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

__all__ = ["start", "take_tickets"]

start: Callable[..., None] = mx.async_eval
"""Evaluate arrays without waiting for them."""

_WORDS = 32
"""Counters of a tile of rows (``TICKET_WORDS`` in ``decode_merge.cuh``)."""
_AT_A_TIME = 128
_free: dict[int, list[mx.array]] = {}


def take_tickets(tiles: int) -> mx.array:
    """Counters at zero for at least ``tiles`` tiles of rows, that no one else has."""
    size = _WORDS << (tiles - 1).bit_length()
    free = _free.setdefault(size, [])
    try:
        return free.pop()
    except IndexError:
        tickets = mx.split(mx.zeros((_AT_A_TIME * size,), dtype=mx.uint32), _AT_A_TIME)
        start(*tickets)
        free.extend(tickets[1:])
        return tickets[0]
