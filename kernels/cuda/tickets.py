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
"""Words between counters: a cache line each (``TICKET_WORDS`` in ``decode.cuh``)."""
_AT_A_TIME = 128
_free: dict[int, list[mx.array]] = {}


def take_tickets(count: int) -> mx.array:
    """At least ``count`` counters at zero that no one else has."""
    size = _WORDS << (count - 1).bit_length()
    free = _free.setdefault(size, [])
    if not free:
        tickets = mx.split(mx.zeros((_AT_A_TIME * size,), dtype=mx.uint32), _AT_A_TIME)
        start(*tickets)
        free.extend(tickets)
    return free.pop()
