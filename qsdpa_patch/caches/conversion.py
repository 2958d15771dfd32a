"""From mlx-lm's caches to quantized ones."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

from qsdpa_patch.caches.base import DEFAULT_FORMAT
from qsdpa_patch.caches.batch import BatchQuantizedKVCache, BatchQuantizedLatentCache
from qsdpa_patch.caches.batch_rotating import BatchQuantizedRotatingKVCache
from qsdpa_patch.caches.chunked import QuantizedChunkedKVCache
from qsdpa_patch.caches.latent import QuantizedLatentCache
from qsdpa_patch.caches.quantized import QuantizedKVCache
from qsdpa_patch.caches.rotating import QuantizedRotatingKVCache
from qsdpa_patch.kernels.format import Format

__all__ = ["is_quantizable", "quantized"]

_TWINS: dict[type, type[Any]] = {
    mlx_lm_cache.KVCache: QuantizedKVCache,
    mlx_lm_cache.QuantizedKVCache: QuantizedKVCache,
    mlx_lm_cache.RotatingKVCache: QuantizedRotatingKVCache,
    mlx_lm_cache.ChunkedKVCache: QuantizedChunkedKVCache,
    mlx_lm_cache.BatchKVCache: BatchQuantizedKVCache,
    mlx_lm_cache.BatchRotatingKVCache: BatchQuantizedRotatingKVCache,
}
_LATENT_TWINS: dict[type, type[Any]] = _TWINS | {
    mlx_lm_cache.KVCache: QuantizedLatentCache,
    mlx_lm_cache.QuantizedKVCache: QuantizedLatentCache,
    mlx_lm_cache.BatchKVCache: BatchQuantizedLatentCache,
}


def is_quantizable(cache: Any) -> bool:
    """Whether :func:`quantized` has a twin for ``cache``, or for a member of it."""
    if type(cache) is mlx_lm_cache.CacheList:
        return any(map(is_quantizable, cache.caches))
    return type(cache) in _TWINS


def quantized(
    cache: Any,
    key_format: Format | str | None = DEFAULT_FORMAT,
    value_format: Format | str | None = "same",
    *,
    latent: bool = False,
    members: Container[int] | None = None,
) -> Any:
    """The quantized twin of one of mlx-lm's caches, with its contents.

    Args:
        cache: a cache in any state. It stays as it was; what it holds is freed with it.
        key_format, value_format: as for :class:`QuantizedCache`.
        latent: the cache holds latents as keys and rotary keys as values (MLA). The values stay plain.
        members: positions of a ``CacheList`` to convert, by default all. A member whose buffers the model itself
            assigns (the indexer of DeepSeek 3.2) must be left out.

    Returns:
        A cache of the class that goes with ``cache``'s; a ``CacheList`` of such; or ``cache`` itself where there is
        none (its class is unknown or holds no keys and values), or where it is quantized here already.
    """
    if latent:
        value_format = None
    if type(cache) is mlx_lm_cache.CacheList:
        return mlx_lm_cache.CacheList(
            *(
                quantized(member, key_format, value_format, latent=latent)
                if members is None or i in members
                else member
                for i, member in enumerate(cache.caches)
            )
        )
    twin = (_LATENT_TWINS if latent else _TWINS).get(type(cache))
    return cache if twin is None else twin.from_cache(cache, key_format, value_format)
