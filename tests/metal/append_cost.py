"""What it takes a GPU to put one token into a cache: the dispatches of an update, counted in its graph."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch.caches import QuantizedKVCache
from qsdpa_patch.kernels.format import Format
from tests.metal.emulated_backend import emulated_row_quantization

__all__ = ["count_dispatches", "dispatches_of_caches"]

_DISPATCHES = {"Quantize": 1, "SliceUpdate": 1, "Concatenate": 2, "Slice": 0, "Split": 0, "View": 0, "Reshape": 0}
"""Dispatches of MLX's primitives on Metal: a concatenation (of two arrays, here) copies one after the other, and views
cost none."""


def count_dispatches(cache: Any) -> Counter[str]:
    """Dispatches by primitive when ``cache``, which holds rows already, takes one more; those of 0 are left out.

    A kernel that runs in the emulator is counted by its launches.
    """
    rows = mx.random.normal((1, 8, 300, 128))
    cache.update_and_fetch(rows, rows)
    mx.eval(cache.state)
    with emulated_row_quantization() as launches:
        key, value = mx.random.normal((1, 8, 1, 128)), mx.random.normal((1, 8, 1, 128))
        cache.update_and_fetch(key, value)  # the first use of a kernel also checks it
        mx.eval(cache.state, key, value)
        before = len(launches)
        counted = _dispatches_of(cache.update_and_fetch(key, value))
        if len(launches) > before:
            counted["quantize_rows"] = len(launches) - before
    return counted


def dispatches_of_caches() -> Iterator[tuple[str, Counter[str]]]:
    """Caches, and what an update takes: mlx-lm's quantized one, ours, and an unquantized one."""
    four = Format.affine(4)
    yield "mlx-lm quantized", count_dispatches(mlx_lm_cache.QuantizedKVCache(group_size=64, bits=4))
    yield "4-bit keys and values", count_dispatches(QuantizedKVCache(four))
    yield "the same, rotated", count_dispatches(QuantizedKVCache(Format.affine(4, rotated=True)))
    yield "8-bit keys, 4-bit values", count_dispatches(QuantizedKVCache(Format.affine(8), four))
    yield "unquantized", count_dispatches(mlx_lm_cache.KVCache())


def _dispatches_of(result: Any) -> Counter[str]:
    """Dispatches of the graph of ``result``: arrays, or tensors with packed parts, or tuples of them."""
    arrays = [part for x in result for part in (x if isinstance(x, list | tuple) else getattr(x, "parts", [x]))]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *arrays)
        primitives = Counter(re.findall(r'label ?="(\w+)"', path.read_text()))
    return Counter({name: count * _DISPATCHES[name] for name, count in primitives.items() if _DISPATCHES[name]})
