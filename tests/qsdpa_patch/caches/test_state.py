"""Prompt cache files: what a state holds, what is refused, and whose class reads it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch import caches
from qsdpa_patch.caches import SAVED_CLASSES, QuantizedKVCache, QuantizedRotatingKVCache
from qsdpa_patch.caches.batch_base import BatchQuantizedCache
from qsdpa_patch.caches.codec import as_format
from qsdpa_patch.kernels.format import Format
from tests.qsdpa_patch.caches.twins import ALL_FORMATS, DTYPES, Kind, Rows, assert_same, saved_and_loaded

EMPTY: list[Any] = [
    caches.QuantizedKVCache("nvfp4"),
    caches.QuantizedLatentCache("nvfp4"),
    caches.QuantizedRotatingKVCache(7, 2, "nvfp4"),
    caches.QuantizedChunkedKVCache(7, "nvfp4"),
    caches.BatchQuantizedKVCache([0, 2], "nvfp4"),
    caches.BatchQuantizedLatentCache([0, 2], "nvfp4"),
    caches.BatchQuantizedRotatingKVCache(7, [0, 2], "nvfp4"),
]


def filled(cache: Any) -> Any:
    cache.update_and_fetch(*Rows(Kind()).draw(5))
    return cache


@pytest.mark.parametrize("cache", EMPTY, ids=lambda cache: type(cache).__qualname__)
def test_an_empty_cache_survives_a_file(cache: Any, tmp_path: Path) -> None:
    loaded = saved_and_loaded(cache, tmp_path / "cache.safetensors")
    assert type(loaded) is type(cache)
    assert loaded.empty()
    assert loaded.key_format == Format.named("nvfp4")
    assert loaded.value_format == cache.value_format
    for name in cache._counters:
        assert_same(getattr(loaded, name), getattr(cache, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ALL_FORMATS, ids=str)
def test_every_format_and_dtype_survives_a_file(format: Format | None, dtype: mx.Dtype, tmp_path: Path) -> None:
    cache = QuantizedKVCache(format, None)
    cache.update_and_fetch(*Rows(Kind(key_dim=80, dtype=dtype)).draw(5))
    loaded = saved_and_loaded(cache, tmp_path / "cache.safetensors")
    assert (loaded.key_format, loaded.value_format) == (cache.key_format, None)
    assert loaded.offset == 5
    assert loaded.nbytes == cache.nbytes
    for actual, expected in zip(loaded.keys_and_values(), cache.keys_and_values()):
        assert actual.dtype == dtype
        assert type(actual) is type(expected)
        assert_same(actual, expected)


@pytest.mark.parametrize("value_format", ["same", None, "mxfp8"])
@pytest.mark.parametrize("empty", EMPTY, ids=lambda cache: type(cache).__qualname__)
def test_caches_are_pickled_as_those_of_mlx_lm_are(empty: Any, value_format: str | None) -> None:
    def rows() -> Any:
        batch = 2 if isinstance(empty, BatchQuantizedCache) else 1
        return (mx.random.normal((batch, 2, 1, 64)), mx.random.normal((batch, 2, 1, 64)))

    cache = copy.deepcopy(empty)
    cache.value_format = as_format("nvfp4" if value_format == "same" else value_format, "value_format")
    for _ in range(9):  # a window is full, and goes round
        cache.update_and_fetch(*rows())
    loaded = pickle.loads(pickle.dumps(cache))
    assert type(loaded) is type(cache)
    new = rows()
    for actual, expected in zip(loaded.update_and_fetch(*new), cache.update_and_fetch(*new), strict=True):
        assert type(actual) is type(expected)
        assert_same(actual, expected)


def test_lists_of_caches_survive_a_file(tmp_path: Path) -> None:
    inner = filled(QuantizedRotatingKVCache(4))
    listed = mlx_lm_cache.CacheList(filled(QuantizedKVCache()), inner)
    loaded = saved_and_loaded(listed, tmp_path / "cache.safetensors")
    assert [type(c) for c in loaded.caches] == [QuantizedKVCache, QuantizedRotatingKVCache]
    assert_same(loaded[1].keys_and_values()[0], inner.keys_and_values()[0])


def test_files_of_stock_caches_still_load_with_stock_classes(tmp_path: Path) -> None:
    assert not any(hasattr(mlx_lm_cache, name) for name in SAVED_CLASSES)
    stock = filled(mlx_lm_cache.QuantizedKVCache(group_size=32, bits=4))
    loaded = saved_and_loaded(stock, tmp_path / "cache.safetensors")
    assert type(loaded) is mlx_lm_cache.QuantizedKVCache


def test_every_cache_has_a_name_in_files() -> None:
    assert set(SAVED_CLASSES.values()) == {type(cache) for cache in EMPTY}
    assert all(cls.__name__ == name == f"QSDPA{cls.__qualname__}" for name, cls in SAVED_CLASSES.items())


def damaged_header(**changes: Any) -> str:
    return json.dumps(json.loads(filled(QuantizedKVCache()).state[-1]) | changes)


OTHER_GROUPS = {"format": {"bits": 8, "group_size": 32}, "dim": 64, "dtype": "float32"}


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (-1, "", "no cache of qsdpa_patch"),
        (-1, 4, "no cache of qsdpa_patch"),
        (-1, "[1]", "no cache of qsdpa_patch"),
        (-1, damaged_header(version=0), "layout 0; this qsdpa_patch reads layout 2"),
        (-1, damaged_header(keys={}), "header of the cache is damaged"),
        (-1, damaged_header(keys=None), "header of the cache is damaged"),
        (-1, damaged_header(keys={"format": {"mode": "affine", "bits": 7}}), "bits=7"),
        (-1, damaged_header(keys=OTHER_GROUPS), "2 buffers"),
        (-1, damaged_header(values={"format": None, "dim": 64, "dtype": "float32"}), "2 buffers in place of 3"),
        (-1, damaged_header(values={"format": None, "dim": 64, "dtype": "int8"}), "header of the cache is damaged"),
        (-1, damaged_header(keys=OTHER_GROUPS, values=OTHER_GROUPS), "scales have shape"),
        (-1, QuantizedKVCache().state[-1], "not how they are stored"),
        (0, None, "rows end at 5, its buffers at 0"),
        (0, [mx.zeros((1, 4, 8, 16), mx.uint32)], "1 buffers in place of 2"),
        (0, [mx.zeros((1, 4, 8, 16), mx.float32), mx.zeros((1, 8, 8, 1))], "codes are"),
        (0, [mx.zeros((1, 3, 8, 16), mx.uint32), mx.zeros((1, 6, 8, 1))], "2 tensors in 3 planes"),
        (0, [mx.zeros((1, 4, 8, 16), mx.uint32), mx.zeros((1, 4, 8, 1))], "4 of scales"),
        (0, [mx.zeros((4, 8, 16), mx.uint32), mx.zeros((8, 8, 1))], "have no heads"),
        (0, "keys", "in place of arrays"),
        (1, 9, "rows end at 9, its buffers at 8"),
        (1, -1, "rows end at -1"),
        (1, "5", "its offset is '5'"),
    ],
)
def test_a_damaged_state_is_refused(position: int, value: Any, message: str) -> None:
    state = list(filled(QuantizedKVCache()).state)
    state[position] = value
    with pytest.raises(ValueError, match=message):
        QuantizedKVCache.from_state(state)


@pytest.mark.parametrize("state", [None, [], [1, 2], "state"])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="a state of QuantizedKVCache has 3 entries"):
        QuantizedKVCache.from_state(state)


def test_the_state_of_a_stock_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="no cache of qsdpa_patch"):
        QuantizedKVCache.from_state(mlx_lm_cache.KVCache().state)


def test_a_failed_load_leaves_the_cache_as_it_was() -> None:
    cache = filled(QuantizedKVCache(Format.affine(4)))
    before = cache.keys_and_values()[0]
    state = list(filled(QuantizedKVCache(Format.affine(8))).state)
    state[0] = None
    with pytest.raises(ValueError, match="its buffers at 0"):
        cache.state = state
    assert cache.key_format == Format.affine(4)
    assert_same(cache.keys_and_values()[0], before)
