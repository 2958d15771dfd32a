"""Random walks of two caches that see the same rows: kernels may write into the buffers of one, MLX alone of the other.

Whatever was taken from a cache on the way must stay as it was: slices, states, copies, pickles.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from qsdpa_patch.caches import BatchQuantizedKVCache, QuantizedKVCache, QuantizedRotatingKVCache
from qsdpa_patch.caches.base import QuantizedCache
from qsdpa_patch.kernels.format import Format

Attend = Callable[[Any, mx.array, mx.array, mx.array], mx.array]
"""``attend(cache, queries, keys, values)`` stores new rows and attends to all."""

HEADS, DIM = 2, 64

CACHES: dict[str, Callable[[], QuantizedCache]] = {
    "growing": lambda: QuantizedKVCache(Format.affine(4)),
    "eight bits": lambda: QuantizedKVCache(Format.affine(8, 32)),
    "mxfp4": lambda: QuantizedKVCache("mxfp4"),
    "rotating": lambda: QuantizedRotatingKVCache(600, 4, Format.affine(4)),
    "batch": lambda: BatchQuantizedKVCache([0, 3], Format.affine(4)),
}


@dataclass
class Walk:
    """A walk from one cache, of which there may soon be many copies.

    attend: see :data:`Attend`. dtype: of the rows. batch: sequences. attended: outputs of both caches, to be compared.
    """

    attend: Attend
    dtype: mx.Dtype
    seed: int
    batch: int = 1
    attended: list[tuple[mx.array, mx.array]] = field(default_factory=list)
    in_place: int = 0

    def run(self, make: Callable[[], QuantizedCache], steps: int) -> None:
        """Walk, and check every array that was taken on the way."""
        choose = random.Random(self.seed)
        mx.random.seed(self.seed)
        pairs: list[tuple[Any, Any]] = [(make(), _never_in_place(make()))]
        taken: list[tuple[mx.array, mx.array]] = []
        for _ in range(steps):
            pair = choose.choice(pairs)
            kind = choose.choice(["append"] * 12 + ["trim", "copy", "take", "take", "evaluate"])
            if kind == "append":
                self._append(pair, choose.choice([1, 1, 1, 1, 2, 5, 17, 40]))
            elif pair[0].empty():
                continue
            elif kind == "trim":
                count = choose.randint(1, 8)
                assert pair[0].trim(count) == pair[1].trim(count)
            elif kind == "copy" and len(pairs) < 6:
                pairs.append(choose.choice([_deep_copies, _pickled, _restored])(pair))
            elif kind == "take":
                taken += zip(_stored(pair[0]), _stored(pair[1]))
            else:
                mx.eval([cache.state for cache in pair])
        for pair in pairs:
            if not pair[0].empty():
                taken += zip(_stored(pair[0]), _stored(pair[1]))
        for actual, wanted in taken:
            assert mx.array_equal(actual.view(mx.uint8), wanted.view(mx.uint8))

    def _append(self, pair: tuple[Any, Any], count: int) -> None:
        keys, values = (mx.random.normal((self.batch, HEADS, count, DIM)).astype(self.dtype) for _ in range(2))
        queries = mx.random.normal((self.batch, 2 * HEADS, count, DIM)).astype(self.dtype)
        first, second = (self.attend(cache, queries, keys, values) for cache in pair)
        self.in_place += pair[0]._pending is not None
        assert pair[1]._pending is None
        self.attended.append((first, second))


def _never_in_place(cache: Any) -> Any:
    cache._most_in_place = 0
    return cache


def _stored(cache: Any) -> list[mx.array]:
    """The rows of a cache, lazily: whatever becomes of it, they are what they are now."""
    stop = cache._span()[1]
    return [mx.contiguous(x[:, :, :stop]) for x in cache.rows]


def _deep_copies(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    first, second = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    return first, second


def _pickled(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    first, second = pickle.loads(pickle.dumps(pair[0])), pickle.loads(pickle.dumps(pair[1]))
    return first, second


def _restored(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """Caches from the states: deep copies of them, since those of mlx-lm too share arrays that are given as states."""
    first, second = (type(cache).from_state(copy.deepcopy(cache.state)) for cache in pair)
    return first, _never_in_place(second)
