"""The function that takes the place of mlx-lm's ``scaled_dot_product_attention``: first stop of every attention call.

Plain keys and values go straight on to the original. Quantized ones become an
:class:`~qsdpa_patch.kernels.attention_call.AttentionCall` and go to the :class:`~qsdpa_patch.routes.Router`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import mlx.core as mx

from qsdpa_patch.callers import TAKES_STACK_MEMBERS
from qsdpa_patch.kernels.attention_call import RopeTerm, check_call
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, StackMember
from qsdpa_patch.latent_rope import RopeScores
from qsdpa_patch.layer_tags import LayerTag, kind_of, tag_of
from qsdpa_patch.report import recorder
from qsdpa_patch.routes import Caller, Router

__all__ = ["READ_AS_ARRAYS", "make_dispatcher", "quantized_scaled_dot_product_attention", "router"]

READ_AS_ARRAYS = "dequantized: the model's own code works on keys or values before attention"
"""Why a call over a quantized cache goes to mlx-lm's attention."""

router = Router()
"""The router of the process; its settings are those of ``enable``."""


def make_dispatcher(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A replacement for ``original``, mlx-lm's ``scaled_dot_product_attention``.

    It is a plain function with named parameters, because it is called for every layer and token.
    """
    array = mx.array
    quantized_types = (QuantizedTensor, tuple, list)
    plain_caches: set[type] = {type(None)}
    stock_calls = recorder.stock_calls
    frame = sys._getframe

    def scaled_dot_product_attention(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        key_type, value_type = type(keys), type(values)
        if key_type is value_type and (key_type is StackMember or key_type is QuantizedTensor):
            return _attend(queries, keys, values, _caller(cache, frame(1)), scale, mask, sinks)
        if key_type is array and value_type is array:
            module = frame(1).f_globals["__name__"]
            if type(cache) in plain_caches or _is_plain(cache, plain_caches):
                stock_calls[module] = stock_calls.get(module, 0) + 1
                return original(queries, keys, values, cache, scale, mask, sinks)
            if hasattr(cache, "key_format") or (hasattr(cache, "caches") and _holds_quantized(cache)):
                _record_arrays(queries, keys, _caller(cache, frame(1)))
            else:
                stock_calls[module] = stock_calls.get(module, 0) + 1
            if hasattr(cache, "bits"):  # plain arrays all the same: the original would take them for quantized ones
                cache = None
            return original(queries, keys, values, cache, scale, mask, sinks)
        if not isinstance(keys, quantized_types) and not isinstance(values, quantized_types):
            return original(queries, keys, values, cache, scale, mask, sinks)
        caller = _caller(cache, frame(1))
        if isinstance(keys, (tuple, list)) and _is_foreign(cache, caller):
            return original(queries, keys, values, cache, scale, mask, sinks)
        keys, values = _as_tensors(queries, keys, values, cache)
        if type(keys) is not QuantizedTensor or type(values) is not QuantizedTensor:
            _record_arrays(queries, keys, caller)  # one side is plain: both are read as arrays
            return original(queries, keys, values, None, scale, mask, sinks)
        return _attend(queries, keys, values, caller, scale, mask, sinks)

    setattr(scaled_dot_product_attention, TAKES_STACK_MEMBERS, scaled_dot_product_attention)
    return scaled_dot_product_attention


def _attend(
    queries: mx.array,
    keys: QuantizedTensor | StackMember,
    values: QuantizedTensor | StackMember,
    caller: Caller | LayerTag,
    scale: float,
    mask: Any,
    sinks: mx.array | None,
) -> mx.array:
    """Attention over quantized keys and values, with a mask of mlx-lm's or the rope term that stands in its place."""
    rope = None
    if type(mask) is RopeScores:
        rope, mask = RopeTerm(mask.queries, mask.keys), None
    call = check_call(queries, keys, values, scale=scale, mask=mask, sinks=sinks, rope=rope)
    return router.attend(call, caller)


def quantized_scaled_dot_product_attention(
    queries: mx.array,
    keys: QuantizedTensor,
    values: QuantizedTensor,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """``softmax(scale * queries @ keys^T + mask) @ values`` over quantized keys and values.

    Args:
        queries: ``[B, Hq, L, D]`` float16, bfloat16 or float32. Not modified.
        keys: ``[B, Hkv, N, D]``, see :func:`quantize`. ``Hq`` is a multiple of ``Hkv``.
        values: ``[B, Hkv, N, Dv]``, possibly in another format.
        scale: multiplies the scores.
        mask: ``None``, ``"causal"`` (the last query sees all keys, each earlier one a key fewer), or an array that
            broadcasts to ``[B, Hq, L, N]``: boolean (true: attend) or floating (added to the scores).
        sinks: ``[Hq]`` logits that enter the softmax's denominator (as in gpt-oss).

    Returns:
        ``[B, Hq, L, Dv]`` in the dtype of ``queries``. A row with no key left is zero. It takes the routes that
        ``enable`` chose, or the default ones; :func:`report` counts it.

    Raises:
        TypeError, ValueError: for arguments that do not go together.
        FallbackError: with ``strict``, when no fused kernel takes the call.
    """
    call = check_call(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    return router.attend(call, Caller())


def _caller(cache: Any, frame: FrameType) -> Caller | LayerTag:
    """Who calls: what ``cache`` was made for, or else the module of the function that runs in ``frame``."""
    tag = tag_of(cache.caches[0] if hasattr(cache, "caches") else cache)  # DeepSeek v3.2 hands over the list
    if tag is not None:
        return tag
    kind = "shared" if cache is None else kind_of(cache)
    return Caller(frame.f_globals["__name__"].removeprefix("mlx_lm.models."), kind)


def _holds_quantized(cache: Any) -> bool:
    return any(hasattr(member, "key_format") for member in cache.caches)


def _record_arrays(queries: mx.array, keys: mx.array, caller: Caller | LayerTag) -> None:
    """Count a call over a quantized cache whose rows the model read on their way here."""
    example = f"q {list(queries.shape)} k {list(keys.shape)}"
    recorder.record(caller.model_type, caller.kind, "stock", READ_AS_ARRAYS, example)


def _is_plain(cache: Any, known: set[type]) -> bool:
    """Whether ``cache`` neither is quantized nor holds a cache that is. mlx-lm's own such classes become ``known``."""
    if any(hasattr(cache, name) for name in ("key_format", "caches", "bits")):
        return False
    if type(cache).__module__ == "mlx_lm.models.cache":
        known.add(type(cache))
    return True


def _is_foreign(cache: Any, caller: Caller | LayerTag) -> bool:
    """Whether ``models`` leaves this call to mlx-lm."""
    covers = router.settings.covers
    tag = tag_of(cache)
    return not covers(caller.model_type) and (tag is None or not covers(tag.declared))


def _as_tensors(queries: mx.array, keys: Any, values: Any, cache: Any) -> tuple[Any, Any]:
    """Keys and values with the tuples of mlx-lm's own quantized cache turned into tensors.

    Without a cache to say so (layers that share another's keys and values), bits follow from the queries' row length;
    mlx-lm quantizes values as it does keys.
    """
    packed = keys if isinstance(keys, (tuple, list)) else values if isinstance(values, (tuple, list)) else None
    if packed is None:
        return keys, values
    bits = getattr(cache, "bits", None) or packed[0].shape[-1] * 32 // queries.shape[-1]
    tensors = (_from_parts(x, bits) if isinstance(x, (tuple, list)) else x for x in (keys, values))
    return next(tensors), next(tensors)


def _from_parts(parts: Any, bits: int) -> QuantizedTensor:
    """The tensor of stock's ``(codes, scales, biases)``."""
    codes, scales, biases = parts
    return QuantizedTensor(codes, scales, biases, Format.affine(bits, codes.shape[-1] * 32 // bits // scales.shape[-1]))
