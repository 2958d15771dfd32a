"""The time axis of a cache's buffers.

They are a list of arrays ``[B, planes, N, width]`` that share batch and length: codes, and scales with biases, of
quantized rows, or plain rows. Nothing here knows which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import dynamic_roll

__all__ = [
    "Rows", "Span", "allocate", "append", "capacity", "compact", "grow", "join", "next_capacity", "pad", "pick",
    "roll_each", "select", "skip", "stack", "view", "write",
]  # fmt: skip

Rows = list[mx.array]
Span = tuple[int, int]
"""Rows ``start`` to ``stop`` (excluded) of a buffer."""

STEP = 256
"""Buffers are allocated in multiples of this many rows."""
_ALL = slice(None)


def capacity(rows: Rows) -> int:
    """Number of rows that the buffers hold."""
    return int(rows[0].shape[2])


def next_capacity(needed: int, current: int = 0) -> int:
    """Rows to allocate when ``needed`` do not fit in ``current``.

    At least an eighth more than before: each row is then copied a bounded number of times however long the cache
    grows, and at most an eighth of it lies unused.
    """
    return -(-max(needed, current + current // 8) // STEP) * STEP


def allocate(like: Rows, count: int) -> Rows:
    """Zeros for ``count`` rows of the widths, planes, batch and dtypes of ``like``."""
    return [mx.zeros((*x.shape[:2], count, x.shape[3]), x.dtype) for x in like]


def grow(rows: Rows, used: int, count: int) -> Rows:
    """Buffers for ``count`` rows that begin with the first ``used`` of ``rows``."""
    return [mx.pad(x[:, :, :used], [(0, 0), (0, 0), (0, count - used), (0, 0)]) for x in rows]


def write(rows: Rows, start: int, stop: int, new: Rows) -> None:
    """Put ``new`` at rows ``start`` to ``stop``: in place, where nothing else holds the buffers."""
    place = (_ALL, _ALL, slice(start, stop))
    for buffer, x in zip(rows, new):
        buffer[place] = x


def append(rows: Rows | None, start: int, new: Rows, limit: int | None = None) -> Rows:
    """Buffers that hold ``new`` from row ``start`` on, and before that what ``rows`` do: the same ones, unless full.

    They get no longer than ``limit`` rows, which must suffice.
    """
    stop = start + capacity(new)
    if rows is None or stop > capacity(rows):
        count = next_capacity(stop, 0 if rows is None else capacity(rows))
        count = count if limit is None else min(count, limit)
        rows = allocate(new, count) if rows is None else grow(rows, start, count)
    write(rows, start, stop, new)
    return rows


def view(rows: Rows) -> Rows:
    """The same rows as other array objects, which do not follow when ``rows`` are written to."""
    return [x[:] for x in rows]


def select(rows: Rows, start: int, stop: int) -> Rows:
    """Rows ``start`` to ``stop``, as views."""
    place = (_ALL, _ALL, slice(start, stop))
    return [x[place] for x in rows]


def join(rows: Rows, spans: Sequence[Span], new: Rows | None = None) -> Rows:
    """The rows of ``spans`` one after the other, followed by ``new``, as one copy."""
    pieces = [select(rows, start, stop) for start, stop in spans if start < stop]
    if new is not None:
        pieces.append(new)
    if len(pieces) < 2:
        return pieces[0] if pieces else select(rows, 0, 0)
    return [mx.concatenate(list(parts), axis=2) for parts in zip(*pieces)]


def skip(spans: Sequence[Span], count: int) -> list[Span]:
    """``spans`` without their first ``count`` rows."""
    left = []
    for start, stop in spans:
        dropped = min(max(count, 0), stop - start)
        count -= dropped
        left.append((start + dropped, stop))
    return left


def pad(rows: Rows, before: int, after: int) -> Rows:
    """``rows`` between ``before`` and ``after`` rows of zeros."""
    if before == after == 0:
        return rows
    return [mx.pad(x, [(0, 0), (0, 0), (before, after), (0, 0)]) for x in rows]


def pick(rows: Rows, batch_indices: Any) -> Rows:
    """The sequences ``batch_indices`` of a batch."""
    return [x[batch_indices] for x in rows]


def stack(batches: Sequence[Rows]) -> Rows:
    """Batches of equally many rows as one batch."""
    return [mx.concatenate(list(parts)) for parts in zip(*batches)]


def roll_each(rows: Rows, shifts: mx.array) -> Rows:
    """Each sequence of a batch rolled by a number of rows of its own, ``shifts [B]``."""
    return [dynamic_roll(x, shifts[:, None], axis=2) for x in rows]


def compact(rows: Rows) -> Rows:
    """Arrays of their own in place of views, which keep a whole batch alive."""
    return [mx.contiguous(x) for x in rows]
