"""A quantized cache and its unquantized twin, given the same operations and compared.

The twin gets rows that went through the cache's format (quantized and dequantized), so that the two must agree exactly.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import strategies as st
from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch.caches import SAVED_CLASSES
from qsdpa_patch.kernels.format import AFFINE_BITS, FLOAT_FORMATS, Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, quantize

ALL_FORMATS: tuple[Format | None, ...] = (
    *(Format.affine(bits) for bits in AFFINE_BITS),
    Format.affine(4, 128),
    Format.affine(8, 32),
    Format.affine(4, 32, symmetric=True),
    Format.affine(4, rotated=True),
    *(Format.named(name) for name in FLOAT_FORMATS),
    None,
)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
HEAD_DIMS = (32, 64, 72, 80, 96, 128)

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 20)),
        st.tuples(st.just("update"), st.just(1)),
        st.tuples(st.just("trim"), st.integers(0, 25)),
        st.just(("reload", 0)),
        st.just(("copy", 0)),
    ),
    min_size=4,
    max_size=16,
)
"""Operations of a cache of one sequence, as ``(name, count)``."""


@dataclass(frozen=True)
class Kind:
    """What the rows of a cache are like."""

    key_format: Format | None = Format.affine(4)  # noqa: RUF009 - frozen
    value_format: Format | None = Format.affine(8)  # noqa: RUF009 - frozen
    key_dim: int = 64
    value_dim: int = 64
    dtype: mx.Dtype = mx.float32
    batch: int = 1
    heads: int = 2


def kinds(batch: int = 1) -> st.SearchStrategy[Kind]:
    """Any two formats, head dims and dtype."""
    formats, dims = st.sampled_from(ALL_FORMATS), st.sampled_from(HEAD_DIMS)
    return st.builds(Kind, formats, formats, dims, dims, st.sampled_from(DTYPES), st.just(batch), st.integers(1, 2))


@dataclass
class Rows:
    """An endless supply of random rows."""

    kind: Kind
    drawn: int = field(default=0)

    def draw(self, count: int, batch: int | None = None) -> tuple[mx.array, mx.array]:
        kind = self.kind
        self.drawn += 1
        shape = (kind.batch if batch is None else batch, kind.heads, count)
        seeds = mx.random.split(mx.random.key(self.drawn))
        keys = mx.random.normal((*shape, kind.key_dim), key=seeds[0]).astype(kind.dtype)
        values = mx.random.normal((*shape, kind.value_dim), key=seeds[1]).astype(kind.dtype)
        return keys, values

    def as_stored(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The values that the cache holds of these rows."""
        return _as_stored(keys, self.kind.key_format), _as_stored(values, self.kind.value_format)


def _as_stored(x: mx.array, format: Format | None) -> mx.array:
    return x if format is None else quantize(x, format).dequantize()


@dataclass
class Twins:
    """``cache`` and its unquantized ``twin``."""

    cache: Any
    twin: Any
    rows: Rows

    def run(self, operations: list[tuple[str, int]], folder: Path) -> None:
        """Perform ``operations`` one by one, and compare after each. ``folder`` takes files."""
        self.compare()
        for name, count in operations:
            if name == "update":
                self.update(count)
            elif name == "trim":
                self.trim(count)
            elif name == "reload":
                self.cache = saved_and_loaded(self.cache, folder / "cache.safetensors")
            else:
                self.copy()
            self.compare()

    def update(self, count: int) -> None:
        keys, values = self.rows.draw(count)
        fetched = self.cache.update_and_fetch(keys, values)
        expected = self.twin.update_and_fetch(*self.rows.as_stored(keys, values))
        self.compare_rows(fetched, expected)

    def trim(self, count: int) -> None:
        assert self.cache.is_trimmable() == self.twin.is_trimmable()
        if self.cache.is_trimmable():
            assert self.cache.trim(count) == self.twin.trim(count)

    def copy(self) -> None:
        """Go on with a copy; what then happens to the original must not show."""
        original, self.cache = self.cache, copy.deepcopy(self.cache)
        if not original.empty():
            original.update_and_fetch(*self.rows.draw(1))

    def compare(self) -> None:
        """Everything that can be asked of both must give the same answer."""
        cache, twin = self.cache, self.twin
        assert cache.empty() == twin.empty()
        assert cache.is_trimmable() == twin.is_trimmable()
        assert_same(cache.offset, twin.offset)
        assert cache.size() == twin.size()
        for name in ("_idx", "_offset", "rotated", "start_position"):
            assert getattr(cache, name, None) == getattr(twin, name, None)
        if hasattr(twin, "make_mask"):
            for length in (1, 3):
                for options in ({}, {"return_array": True}, {"window_size": 5}):
                    arguments = {"window_size": None, "return_array": False} | options
                    assert_same(cache.make_mask(length, **arguments), twin.make_mask(length, **arguments))
        if not twin.empty() and hasattr(twin, "keys_and_values"):
            self.compare_rows(cache.keys_and_values(), twin.keys_and_values())

    def compare_rows(self, actual: tuple[mx.array, mx.array], expected: tuple[mx.array, mx.array]) -> None:
        kind = self.rows.kind
        for x, twin, format in zip(actual, expected, (kind.key_format, kind.value_format)):
            assert isinstance(x, QuantizedTensor) == (format is not None)
            assert x.dtype == kind.dtype
            self.compare_values(x, twin)

    def compare_values(self, actual: mx.array, expected: mx.array) -> None:
        assert_same(actual, expected)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal values, and arrays of equal shape."""
    if isinstance(expected, mx.array):
        assert actual.shape == expected.shape
        assert mx.array_equal(actual, expected)
    else:
        assert actual == expected


def saved_and_loaded(cache: Any, path: Path) -> Any:
    """``cache`` after a round trip through a prompt cache file."""
    with pytest.MonkeyPatch.context() as patch:
        for name, cls in SAVED_CLASSES.items():
            patch.setattr(mlx_lm_cache, name, cls, raising=False)
        mlx_lm_cache.save_prompt_cache(str(path), [cache])
        (loaded,) = mlx_lm_cache.load_prompt_cache(str(path))
    return loaded
