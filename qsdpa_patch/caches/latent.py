"""The quantized cache of latent attention (MLA)."""

from __future__ import annotations

from typing import Any, Self

import mlx.core as mx

from qsdpa_patch.caches.base import DEFAULT_FORMAT, QuantizedCache, saved
from qsdpa_patch.caches.packed_rows import Rows
from qsdpa_patch.caches.quantized import QuantizedKVCache
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor
from qsdpa_patch.latent_rope import RopeKeys

__all__ = ["LatentCache", "QuantizedLatentCache"]


class LatentCache(QuantizedCache):
    """A cache whose values are rotary keys: where these are plain, they come back as :class:`RopeKeys`."""

    def _decode(self, rows: Rows) -> tuple[mx.array, mx.array]:
        latent, rope_keys = super()._decode(rows)
        return latent, rope_keys if isinstance(rope_keys, QuantizedTensor) else RopeKeys(rope_keys)


@saved
class QuantizedLatentCache(LatentCache, QuantizedKVCache):
    """A cache for models with absorbed MLA, which keep the latent as keys and the rotary keys as values.

    The latent ``[B, 1, N, R]`` is quantized; the few rotary dims stay in the model's dtype unless ``value_format`` says
    otherwise, and come back as :class:`RopeKeys`, through which attention finds them again. Behaves as the
    :class:`mlx_lm.models.cache.KVCache` that those models use.
    """

    def __init__(
        self, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = None
    ) -> None:
        super().__init__(key_format, value_format)

    @classmethod
    def merge(cls, caches: list[Any]) -> Any:
        """A batch cache of these caches, each of one sequence."""
        from qsdpa_patch.caches.batch import BatchQuantizedLatentCache  # which is made of the class here

        return BatchQuantizedLatentCache.merge(caches)

    @classmethod
    def from_cache(
        cls, cache: Any, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = None
    ) -> Self:
        """A cache with the contents of mlx-lm's ``KVCache`` of latents and rotary keys, in these formats."""
        return super().from_cache(cache, key_format, value_format)
