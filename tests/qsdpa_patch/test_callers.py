"""Which functions get rows for attention alone: those whose source shows no other use."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import base, llama

import qsdpa_patch
from qsdpa_patch import callers
from qsdpa_patch.caches import BatchQuantizedKVCache, QuantizedKVCache, QuantizedRotatingKVCache
from qsdpa_patch.dispatcher import router
from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, StackMember

FORMAT = Format.affine(4)

HANDED_ON = {
    "as most models do": """
    keys, values = cache.update_and_fetch(keys, values)
    return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0, mask=mask)
""",
    "with or without a cache": """
    if cache is not None:
        keys = keys + 0
        keys, values = cache.update_and_fetch(keys, values)
    else:
        keys = keys * 1
        values = values[:]
    out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0, mask=mask)
    return out.reshape(out.shape)
""",
    "a mask of the rows' shape": """
    keys, values = cache.update_and_fetch(keys, values)
    if mask is not None and mask.shape[-1] != keys.shape[-2]:
        mask = mask[..., -keys.shape[-2] :]
    return scaled_dot_product_attention(queries, keys=keys, values=values, cache=cache, scale=1.0, mask=mask)
""",
}

USED = {
    "an operation": """
    keys, values = cache.update_and_fetch(keys, values)
    keys = keys + 0
    return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0, mask=mask)
""",
    "another function": """
    keys, values = cache.update_and_fetch(keys, values)
    print(mx.sum(keys).shape, end="")
    return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0, mask=mask)
""",
    "another name": """
    keys, values = cache.update_and_fetch(keys, values)
    same = values
    return scaled_dot_product_attention(queries, keys, same, cache=cache, scale=1.0, mask=mask)
""",
    "returned": """
    keys, values = cache.update_and_fetch(keys, values)
    out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0, mask=mask)
    return (out, (keys, values))[0]
""",
    "a loop": """
    for _ in range(1):
        keys = keys + 0
        keys, values = cache.update_and_fetch(keys, values)
    return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0, mask=mask)
""",
    "a closure": """
    keys, values = cache.update_and_fetch(keys, values)
    return (lambda: scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0, mask=mask))()
""",
    "one name for both": """
    rows = cache.update_and_fetch(keys, values)
    return scaled_dot_product_attention(queries, rows[0], rows[1], cache=cache, scale=1.0, mask=mask)
""",
    "an attention of its own": """
    attention = scaled_dot_product_attention
    keys, values = cache.update_and_fetch(keys, values)
    return attention(queries, keys, values, cache=cache, scale=1.0, mask=mask)
""",
}


def _function(body: str, attention: Any) -> Callable[..., mx.array]:
    """A function with that body, whose source ``inspect`` finds."""
    text = f"def attend(queries, keys, values, cache, mask=None):{body}"
    name = f"<attend {abs(hash(text))}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "made_here", "mx": mx, "scaled_dot_product_attention": attention}
    exec(compile(text, name, "exec", dont_inherit=True), names)
    return names["attend"]  # type: ignore[no-any-return]


def _rows(seed: int = 0, heads: int = 2) -> mx.array:
    return mx.random.normal((1, heads, 1, 64), key=mx.random.key(seed)).astype(mx.float16)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type]]:
    """The types of the keys of the calls that the router serves; the patch is on."""
    types: list[type] = []
    attend = router.attend

    def noting(call: AttentionCall, caller: Any) -> mx.array:
        types.append(type(call.keys))
        return attend(call, caller)

    with qsdpa_patch.enabled():
        monkeypatch.setattr(router, "attend", noting)
        yield types


@pytest.mark.parametrize(
    ("name", "expected"), [*((n, StackMember) for n in HANDED_ON), *((n, QuantizedTensor) for n in USED)]
)
def test_what_the_source_shows(name: str, expected: type, taken: list[type]) -> None:
    attend = _function({**HANDED_ON, **USED}[name], base.scaled_dot_product_attention)
    cache, arrays = QuantizedKVCache(FORMAT), QuantizedKVCache(FORMAT)
    for step in range(3):
        out = attend(_rows(step, 4), _rows(10 + step), _rows(20 + step), cache)
        keys, values = arrays.update_and_fetch(_rows(10 + step), _rows(20 + step))
        assert type(keys) is QuantizedTensor
        reference = base.scaled_dot_product_attention(_rows(step, 4), keys, values, cache=None, scale=1.0, mask=None)
        assert mx.allclose(out, reference, atol=4e-3)  # what is done to rows as arrays is rounded
    assert taken.count(StackMember) == (3 if expected is StackMember else 0)


def test_an_attention_that_is_not_the_patched_one_gets_arrays(taken: list[type]) -> None:
    seen: list[type] = []

    def own_attention(queries: mx.array, keys: mx.array, values: mx.array, **_: Any) -> mx.array:
        seen.append(type(keys))
        return queries

    # As functools.wraps would: with the attributes of the patched function, but not that function.
    own_attention.__dict__.update(vars(base.scaled_dot_product_attention))
    _function(HANDED_ON["as most models do"], own_attention)(_rows(0, 4), _rows(1), _rows(2), QuantizedKVCache(FORMAT))
    assert seen == [QuantizedTensor]


def test_without_the_patch_rows_are_arrays() -> None:
    with qsdpa_patch.enabled():
        attend = _function(HANDED_ON["as most models do"], base.scaled_dot_product_attention)
    attend.__globals__["scaled_dot_product_attention"] = lambda queries, keys, values, **_: keys
    assert type(attend(_rows(0, 4), _rows(1), _rows(2), QuantizedKVCache(FORMAT))) is QuantizedTensor


def test_a_source_that_cannot_be_read() -> None:
    names: dict[str, Any] = {}
    exec("def attend(cache):\n    return sys._getframe()", {"sys": sys}, names)
    assert not callers.only_attends(names["attend"](None))


def test_a_source_that_was_changed_since() -> None:
    with qsdpa_patch.enabled():
        attend = _function(USED["an operation"], base.scaled_dot_product_attention)
    text = f"def attend(queries, keys, values, cache, mask=None):{HANDED_ON['as most models do']}"
    name = attend.__code__.co_filename
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    assert not callers._reads_so(attend.__code__)


@pytest.mark.parametrize(
    ("value_format", "expected"), [("same", StackMember), (Format.affine(8), StackMember), (None, QuantizedTensor)]
)
def test_rows_come_as_arrays_unless_both_sides_are_quantized(
    value_format: Any, expected: type, taken: list[type]
) -> None:
    seen: list[type] = []
    attend = _function(HANDED_ON["as most models do"], base.scaled_dot_product_attention)
    cache = QuantizedKVCache(FORMAT, value_format)
    hand_over = cache._hand_over

    def noting(attends: bool) -> Any:
        keys, values = hand_over(attends)
        seen.append(type(keys))
        return keys, values

    cache._hand_over = noting  # type: ignore[method-assign]
    attend(_rows(0, 4), _rows(1), _rows(2), cache)
    assert seen == [expected]


@pytest.mark.parametrize("kernels", ["auto", "ops"])
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantizedKVCache(FORMAT),
        lambda: QuantizedRotatingKVCache(64, 0, FORMAT),
        lambda: BatchQuantizedKVCache([0], FORMAT),
        lambda: QuantizedKVCache(Format.named("mxfp4")),
        lambda: QuantizedKVCache(Format.affine(4, rotated=True)),
        lambda: QuantizedKVCache(FORMAT, Format.affine(8)),
    ],
)
def test_every_cache_and_route(make: Callable[[], Any], length: int, kernels: str) -> None:
    def rows(seed: int, heads: int) -> mx.array:
        return mx.random.normal((1, heads, length, 64), key=mx.random.key(seed))

    with qsdpa_patch.enabled(kernels=kernels):
        attend = _function(HANDED_ON["as most models do"], base.scaled_dot_product_attention)
        cache, arrays = make(), make()
        for step in range(2):
            out = attend(rows(step, 4), rows(10 + step, 2), rows(20 + step, 2), cache, "causal")
            keys, values = arrays.update_and_fetch(rows(10 + step, 2), rows(20 + step, 2))
            same = base.scaled_dot_product_attention(
                rows(step, 4), keys, values, cache=arrays, scale=1.0, mask="causal"
            )
            assert mx.allclose(out, same, atol=1e-6)


def test_a_model_of_mlx_lm() -> None:
    assert callers._reads_so(llama.Attention.__call__.__code__)


def test_a_member_answers_as_the_tensor_does() -> None:
    cache = QuantizedKVCache(FORMAT)
    keys, _ = cache.update_and_fetch(_rows(1), _rows(2))
    assert isinstance(keys, QuantizedTensor)
    assert keys.stack is not None
    member = keys.stack.members()[0]
    for name in ("shape", "dtype", "dim", "padded_dim", "format", "scale_dtype", "index", "ndim", "packed_nbytes"):
        assert getattr(member, name) == getattr(keys, name), name
    assert mx.array_equal(member.dequantize(), keys.dequantize())
    assert all(mx.array_equal(a, b) for a, b in zip(member.parts, keys.parts, strict=True))
