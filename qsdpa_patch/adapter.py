"""What an adapter says about a family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Adapter", "Layer", "LayerPlan"]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer's cache when it is quantized.

    latent: the cache holds an MLA latent in its keys and the rope keys in its values; the latent is quantized and
        serves as keys and values, the rope keys stay in the model's dtype.
    keep: a reason to leave the cache as it is, or empty to quantize it. The report shows it.
    kind: what the report calls the layer, where the cache's class does not say it.
    """

    latent: bool = False
    keep: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Layer:
    """One cache of a model: what an adapter decides upon.

    model_type: module name under ``mlx_lm.models``, or the ``model_type`` of a model from elsewhere.
    index: position in the list of caches that the model makes.
    part: position within a ``CacheList`` (0 elsewhere).
    cache: the unquantized cache, filled or empty.
    """

    model_type: str
    index: int
    part: int
    cache: Any


@dataclass(frozen=True)
class Adapter:
    """What is special about some models. Everything has a default that serves a plain decoder.

    name: unique, for ``unregister_adapter`` and messages.
    model_types: the models it speaks for, as in :class:`Layer`. The last registered adapter for a type wins.
    latent: those of them whose caches hold an MLA latent (:class:`LayerPlan`).
    own_attention: those that compute attention themselves instead of calling
        ``mlx_lm.models.base.scaled_dot_product_attention``, with the reason. They read the quantized cache as
        dequantized arrays.
    plan_layer: decides per layer, where the data above is not enough.
    """

    name: str
    model_types: tuple[str, ...]
    latent: tuple[str, ...] = ()
    own_attention: Mapping[str, str] = field(default_factory=dict)
    plan_layer: Callable[[Layer], LayerPlan] | None = None

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise ValueError(f"name={self.name!r}: an adapter needs a name")
        if isinstance(self.model_types, str) or not self.model_types:
            raise ValueError(f"model_types={self.model_types!r}: give a tuple of model types, ('llama',) say")
        for label, subset in (("latent", self.latent), ("own_attention", self.own_attention)):
            if isinstance(subset, str) or not set(subset) <= set(self.model_types):
                raise ValueError(f"{label}={subset!r}: name only model types of this adapter, {self.model_types}")

    def plan(self, layer: Layer) -> LayerPlan:
        """The plan for ``layer``."""
        if self.plan_layer is not None:
            return self.plan_layer(layer)
        return LayerPlan(latent=layer.model_type in self.latent)
