"""Calls that are like earlier ones over the same cache are not checked again, except for what changes with each."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from qsdpa_patch.caches.quantized import QuantizedKVCache
from qsdpa_patch.kernels import attention_call
from qsdpa_patch.kernels.attention_call import RopeTerm, check_call
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import quantize

FORMAT = Format.affine(4)


def rows(*shape: int) -> mx.array:
    return mx.random.normal(shape)


def members(cache: QuantizedKVCache, count: int = 1, batch: int = 1, heads: int = 2) -> Any:
    """Keys and values of ``cache`` as attention gets them, after ``count`` more rows; of another batch, the first."""
    if cache.rows is not None and cache.rows[0].shape[0] != batch:
        cache.rows, cache.offset = None, 0
    cache.update_and_fetch(rows(batch, heads, count, 64), rows(batch, heads, count, 64))
    assert cache._layout is not None
    return cache._layout.members(cache._buffers(), cache.offset)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of queries whose calls were checked in full."""
    checked: list[tuple[int, ...]] = []
    original = attention_call._describe

    def describe(queries: mx.array, *others: Any) -> Any:
        checked.append(queries.shape)
        return original(queries, *others)

    monkeypatch.setattr(attention_call, "_describe", describe)
    return checked


def test_steps_of_one_cache_are_described_once(checks: list[tuple[int, ...]]) -> None:
    cache = QuantizedKVCache(FORMAT, FORMAT)
    calls = [check_call(rows(1, 4, 1, 64), *members(cache), scale=1.0) for _ in range(5)]
    assert len(checks) == 1
    assert len({id(call.signature) for call in calls}) == 1
    assert [call.key_count for call in calls] == [1, 2, 3, 4, 5]


def test_equal_signatures_are_one_object_across_caches_and_tensors() -> None:
    queries = rows(1, 4, 1, 64)
    first, second = (check_call(queries, *members(QuantizedKVCache(FORMAT, FORMAT)), scale=1.0) for _ in range(2))
    loose = check_call(queries, quantize(rows(1, 2, 9, 64), FORMAT), quantize(rows(1, 2, 9, 64), FORMAT), scale=1.0)
    assert first.signature is second.signature is loose.signature


@pytest.mark.parametrize(
    "change",
    [
        lambda c: check_call(rows(1, 4, 2, 64), *members(c), scale=1.0),
        lambda c: check_call(rows(1, 8, 1, 64), *members(c), scale=1.0),
        lambda c: check_call(rows(1, 4, 1, 64).astype(mx.float16), *members(c), scale=1.0),
        lambda c: check_call(rows(3, 4, 1, 64), *members(c, batch=3), scale=1.0),
        lambda c: check_call(rows(1, 4, 1, 64), *members(c), scale=1.0, sinks=mx.zeros(4)),
        lambda c: check_call(rows(1, 4, 1, 64), *members(c), scale=1.0, mask=mx.array(True)),
        lambda c: check_call(rows(1, 4, 1, 64), *members(c), scale=1.0, mask=mx.array(0.0)),
        lambda c: check_call(
            rows(1, 4, 1, 64), *members(c), scale=1.0, rope=RopeTerm(rows(1, 4, 1, 32), rows(1, 1, c.offset, 32))
        ),
    ],
    ids=["length", "heads", "dtype", "batch", "sinks", "bool", "additive", "rope"],
)  # fmt: skip
def test_whatever_a_signature_holds_makes_another_call(change: Any, checks: list[tuple[int, ...]]) -> None:
    cache = QuantizedKVCache(FORMAT, FORMAT)
    known = check_call(rows(1, 4, 1, 64), *members(cache), scale=1.0).signature
    other = change(cache).signature
    assert len(checks) == 2
    assert other != known
    assert change(cache).signature is other
    assert len(checks) == 2


def test_what_changes_with_each_call_is_checked_each_time() -> None:
    cache = QuantizedKVCache(FORMAT, FORMAT)
    queries = rows(1, 4, 2, 64)
    fitting: list[tuple[str, Any]] = [
        ("mask", lambda n: mx.ones((2, n), mx.bool_)),
        ("sinks", lambda n: mx.zeros(4)),
        ("rope", lambda n: RopeTerm(rows(1, 4, 2, 32), rows(1, 1, n, 32))),
    ]
    wrong: dict[str, Any] = {
        "mask": mx.ones((2, 77), mx.bool_),
        "sinks": mx.zeros(5),
        "rope": RopeTerm(rows(1, 4, 2, 32), rows(1, 1, 77, 32)),
    }
    for name, make in fitting:
        keys, values = members(cache, 3)
        check_call(queries, keys, values, scale=1.0, **{name: make(keys.shape[2])})
        with pytest.raises(ValueError, match=name):
            check_call(queries, keys, values, scale=1.0, **{name: wrong[name]})


def test_a_causal_mask_wants_as_many_keys_as_queries_at_every_call() -> None:
    cache = QuantizedKVCache(FORMAT, FORMAT)
    queries = rows(1, 4, 3, 64)
    keys, values = members(cache, 3)
    assert check_call(queries, keys, values, scale=1.0, mask="causal").mask == "causal"
    assert check_call(queries[:, :, :1], keys, values, scale=1.0, mask="causal").mask is None
    cache.trim(2)
    assert cache._layout is not None
    with pytest.raises(ValueError, match="as many keys or more"):
        check_call(queries, *cache._layout.members(cache._buffers(), cache.offset), scale=1.0, mask="causal")


def test_a_bad_call_over_a_known_cache_is_refused() -> None:
    cache = QuantizedKVCache(FORMAT, FORMAT)
    keys, values = members(cache)
    check_call(rows(1, 4, 1, 64), keys, values, scale=1.0)
    for bad in (rows(2, 4, 1, 64), rows(1, 3, 1, 64), rows(1, 4, 1, 32), rows(4, 1, 64)):
        with pytest.raises(ValueError):
            check_call(bad, keys, values, scale=1.0)
    with pytest.raises(TypeError):
        check_call(rows(1, 4, 1, 64).astype(mx.int32), keys, values, scale=1.0)
    with pytest.raises(TypeError):
        check_call(None, keys, values, scale=1.0)  # type: ignore[arg-type]


def test_what_is_remembered_of_a_cache_is_bounded() -> None:
    cache = QuantizedKVCache(FORMAT, FORMAT)
    keys, values = members(cache)
    for length in range(1, 200):
        check_call(rows(1, 4, length, 64), keys, values, scale=1.0)
    assert len(keys.stack.signatures) <= attention_call._MOST_SEEN
