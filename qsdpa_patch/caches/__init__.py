"""Quantized KV caches: the quantized twins of mlx-lm's caches, and how to get from one to the other."""

from qsdpa_patch.caches.base import SAVED_CLASSES, QuantizedCache
from qsdpa_patch.caches.batch import BatchQuantizedKVCache, BatchQuantizedLatentCache
from qsdpa_patch.caches.batch_rotating import BatchQuantizedRotatingKVCache
from qsdpa_patch.caches.chunked import QuantizedChunkedKVCache
from qsdpa_patch.caches.conversion import is_quantizable, quantized
from qsdpa_patch.caches.latent import QuantizedLatentCache
from qsdpa_patch.caches.quantized import QuantizedKVCache
from qsdpa_patch.caches.rotating import QuantizedRotatingKVCache

__all__ = [
    "SAVED_CLASSES",
    "BatchQuantizedKVCache",
    "BatchQuantizedLatentCache",
    "BatchQuantizedRotatingKVCache",
    "QuantizedCache",
    "QuantizedChunkedKVCache",
    "QuantizedKVCache",
    "QuantizedLatentCache",
    "QuantizedRotatingKVCache",
    "is_quantizable",
    "quantized",
]
