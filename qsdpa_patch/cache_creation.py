"""Where mlx-lm makes, converts and loads caches: the replacements that give quantized ones of ours.

Each ``make_*`` takes the original and returns what takes its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch import caches
from qsdpa_patch.adapter import Layer, LayerPlan
from qsdpa_patch.adapter_registry import adapter_for
from qsdpa_patch.dispatcher import router
from qsdpa_patch.layer_tags import LayerTag, kind_of, set_tag, tag_caches, tag_of
from qsdpa_patch.logs import logger
from qsdpa_patch.report import recorder

__all__ = ["make_maybe_quantize_kv_cache", "make_prompt_cache_maker", "make_to_quantized", "quantize_cache"]

_UNTAGGED = "(unknown)"


def make_prompt_cache_maker(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A replacement for ``make_prompt_cache`` that tags each cache with its model and layer."""

    def make_prompt_cache(model: Any, max_kv_size: int | None = None) -> list[Any]:
        made = original(model, max_kv_size)
        tag_caches(model, made)
        return made

    return make_prompt_cache


def make_maybe_quantize_kv_cache(original: Callable[..., None]) -> Callable[..., None]:
    """A replacement for ``maybe_quantize_kv_cache`` that knows every kind of cache."""

    def maybe_quantize_kv_cache(
        prompt_cache: list[Any], quantized_kv_start: int, kv_group_size: int, kv_bits: int | None
    ) -> None:
        if kv_bits is None:
            return
        for index, cache in enumerate(prompt_cache):
            if isinstance(cache, caches.QuantizedCache):
                _note_other_format(cache, kv_bits, kv_group_size)
            elif not _is_plain(cache):
                _note_kept(cache)
            elif _position(cache) >= quantized_kv_start:
                prompt_cache[index] = quantize_cache(cache, kv_bits, kv_group_size, index)

    return maybe_quantize_kv_cache


def make_to_quantized(original: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement for the method ``to_quantized`` of a cache class."""

    def to_quantized(self: Any, group_size: int = 64, bits: int = 4) -> Any:
        tag = tag_of(self)
        if tag is not None and not _covered(tag):
            return original(self, group_size=group_size, bits=bits)
        return quantize_cache(self, bits, group_size, tag.index if tag else 0)

    return to_quantized


def quantize_cache(cache: Any, bits: int, group_size: int, index: int = 0, part: int = 0) -> Any:
    """The quantized twin of ``cache`` in the formats that the settings and mlx-lm's arguments say.

    Args:
        cache: a cache of mlx-lm's. One that its adapter keeps, or of a kind that holds no keys and values, is
            returned as it is.
        bits, group_size: what mlx-lm was asked for; ``key_bits`` and ``value_bits`` of ``enable`` take precedence.
        index: the layer's position, where the cache has no tag.
        part: position within a ``CacheList``.
    """
    tag = tag_of(cache)
    if tag is not None and not _covered(tag):
        return cache
    if hasattr(cache, "caches"):
        members = (quantize_cache(inner, bits, group_size, index, i) for i, inner in enumerate(cache.caches))
        cache.caches = tuple(members)
        return cache
    if not _is_plain(cache):
        _note_kept(cache)
        return cache
    plan = _plan(cache, tag, index, part)
    model_type, declared = (tag.model_type, tag.declared) if tag else (_UNTAGGED, "")
    kind = plan.kind or ("latent" if plan.latent else tag.kind if tag else kind_of(cache))
    keep = plan.keep or _small_window(cache)
    if keep:
        set_tag(cache, LayerTag(model_type, declared, index, kind))
        recorder.note(model_type, kind, f"kept unquantized: {keep}")
        return cache
    key_format, value_format = router.settings.formats(bits, group_size)
    quantized = caches.quantized(cache, key_format, value_format, latent=plan.latent)
    set_tag(quantized, LayerTag(model_type, declared, index, kind))
    _note_own_attention(model_type, kind)
    return quantized


def _is_plain(cache: Any) -> bool:
    """Whether ``cache`` has a quantized twin, and is not mlx-lm's own quantized one, which serves as it is."""
    return caches.is_quantizable(cache) and type(cache) is not mlx_lm_cache.QuantizedKVCache


def _plan(cache: Any, tag: LayerTag | None, index: int, part: int) -> LayerPlan:
    if tag is None:
        return LayerPlan(latent=_looks_latent(cache))
    adapter = adapter_for(tag.model_type)
    try:
        return adapter.plan(Layer(tag.model_type, index, part, cache))
    except Exception as error:  # an adapter must not stop generation; a cache left alone is always right
        _log_failed_adapter(adapter.name, tag.model_type)
        return LayerPlan(keep=f"adapter {adapter.name!r} failed: {error}")


@functools.cache
def _log_failed_adapter(name: str, model_type: str) -> None:
    """Log the exception being handled; once for an adapter and model, since each token asks again."""
    logger.exception("adapter %r failed for %s: caches stay as they are", name, model_type)


def _small_window(cache: Any) -> str:
    """Why a cache of a sliding window or a chunk stays as it is, or an empty string."""
    window = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    limit = router.settings.keep_windows
    return f"keep_windows={limit} says so for windows of {window} rows" if window and window <= limit else ""


def _looks_latent(cache: Any) -> bool:
    """Whether a cache of unknown origin holds an MLA latent: one head, and rope keys much narrower than the latent."""
    keys, values = cache.keys, cache.values
    return bool(
        keys is not None and keys.ndim == 4 and keys.shape[1] == 1
        and keys.shape[-1] >= 256 and 0 < values.shape[-1] * 4 <= keys.shape[-1]
    )  # fmt: skip


def _note_other_format(cache: Any, bits: int, group_size: int) -> None:
    """Say once that a cache which came quantized, from a file say, stays as it is where other bits are asked for."""
    if cache.key_format is None or getattr(cache, "_qsdpa_format_checked", False):
        return
    cache._qsdpa_format_checked = True
    found = tuple(f and (f.mode, f.bits) for f in (cache.key_format, cache.value_format))
    asked = router.settings.formats(bits, group_size)
    if cache.value_format is not None and found != tuple((f.mode, f.bits) for f in asked):
        tag = tag_of(cache)
        note = (
            f"came quantized as {cache.key_format}/{cache.value_format} and stays so; asked for: {asked[0]}/{asked[1]}"
        )
        recorder.note(tag.model_type if tag else _UNTAGGED, kind_of(cache), note)
        logger.warning("a prompt cache %s", note)


def _note_kept(cache: Any) -> None:
    """Say why a cache that has no quantized twin stays as it is."""
    tag = tag_of(cache)
    if tag is None or hasattr(cache, "key_format"):
        return
    what = type(cache).__name__
    reason = "a recurrent state, no keys and values" if what == "ArraysCache" else f"a {what} has no quantized twin"
    recorder.note(tag.model_type, tag.kind, f"kept unquantized: {reason}")


def _note_own_attention(model_type: str, kind: str) -> None:
    reason = adapter_for(model_type).own_attention.get(model_type)
    if reason:
        recorder.note(model_type, kind, f"quantized, and read as a dequantized array: {reason}")


def _position(cache: Any) -> int:
    """Tokens that ``cache`` has seen; of a list, the most that a member has."""
    if hasattr(cache, "caches"):
        return max(map(_position, cache.caches), default=0)
    offset = getattr(cache, "offset", 0)
    return offset if isinstance(offset, int) else int(offset.max().item())


def _covered(tag: LayerTag) -> bool:
    covers = router.settings.covers
    return covers(tag.model_type) or covers(tag.declared)
