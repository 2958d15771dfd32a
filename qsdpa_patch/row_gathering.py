"""Gathering rows of quantized tensors, for models that pick the keys to attend to (the indexer of DeepSeek v3.2).

Such a model calls ``mx.take_along_axis`` on what its cache gave. Of a :class:`QuantizedTensor` that would dequantize
every row there is to keep a few; here the packed rows are gathered instead, and what comes out is still quantized and
takes the fused kernels. A function of ``mlx.core`` cannot be replaced for one module alone, so the module's name ``mx``
gets a copy of the namespace that differs in this function.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import mlx.core as mx

from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor
from qsdpa_patch.latent_rope import RopeKeys

__all__ = ["GATHERING_MODULES", "gathering_namespace"]

GATHERING_MODULES = ("mlx_lm.models.deepseek_v32",)
"""Modules with a call ``mx.take_along_axis(rows, indices, axis=2)`` between cache and attention."""


def gathering_namespace() -> ModuleType:
    """``mlx.core``, but for its ``take_along_axis``."""
    namespace = ModuleType(mx.__name__, mx.__doc__)
    vars(namespace).update(vars(mx))
    namespace.take_along_axis = take_along_axis  # type: ignore[attr-defined]
    return namespace


def take_along_axis(a: mx.array, indices: mx.array, axis: int | None = None, **stream: Any) -> mx.array:
    """``mx.take_along_axis``; whole rows of quantized keys and of rope keys stay what they are.

    Args:
        a: ``[B, H, N, D]``.
        indices: ``[B, H, K, D]``, each row of which is one number: the row of ``a`` to take.
    """
    if axis in (2, -2) and type(a) in (QuantizedTensor, RopeKeys) and a.ndim == indices.ndim == 4:
        rows = indices[..., :1]

        def gather(part: mx.array) -> mx.array:
            return mx.take_along_axis(part, mx.broadcast_to(rows, (*rows.shape[:3], part.shape[3])), axis=2, **stream)

        if type(a) is QuantizedTensor:
            return a.map_parts(gather)
        return RopeKeys(gather(a))
    return mx.take_along_axis(a, indices, axis, **stream)
