"""Caches remember which model and layer they were made for, so that the report and the adapters can say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["LayerTag", "declared_model_type", "kind_of", "module_model_type", "set_tag", "tag_caches", "tag_of"]

_ATTRIBUTE = "_qsdpa_layer"

_KINDS = {
    "KVCache": "full",
    "BatchKVCache": "full",
    "ConcatenateKVCache": "full",
    "RotatingKVCache": "sliding",
    "BatchRotatingKVCache": "sliding",
    "ChunkedKVCache": "chunked",
    "ArraysCache": "recurrent",
    "CacheList": "list",
    "QSDPAQuantizedKVCache": "full",
    "QSDPABatchQuantizedKVCache": "full",
    "QSDPAQuantizedRotatingKVCache": "sliding",
    "QSDPABatchQuantizedRotatingKVCache": "sliding",
    "QSDPAQuantizedChunkedKVCache": "chunked",
    "QSDPAQuantizedLatentCache": "latent",
    "QSDPABatchQuantizedLatentCache": "latent",
}


@dataclass(frozen=True, slots=True)
class LayerTag:
    """model_type: the module under ``mlx_lm.models``; declared: what the model's configuration calls itself."""

    model_type: str
    declared: str
    index: int
    kind: str


def module_model_type(model: Any) -> str:
    """The name of the module under ``mlx_lm.models`` that defines ``model``, else what it calls itself."""
    module = type(model).__module__
    if module.startswith("mlx_lm.models."):
        return module.removeprefix("mlx_lm.models.")
    return declared_model_type(model) or module


def declared_model_type(model: Any) -> str:
    """The ``model_type`` that ``model`` was configured with, or an empty string."""
    declared = getattr(model, "model_type", None) or getattr(getattr(model, "args", None), "model_type", None)
    return declared if isinstance(declared, str) else ""


def tag_caches(model: Any, caches: list[Any]) -> None:
    """Tag the caches that were made for ``model``."""
    model_type, declared = module_model_type(model), declared_model_type(model)
    for index, cache in enumerate(caches):
        _tag_tree(cache, LayerTag(model_type, declared, index, kind_of(cache)))


def _tag_tree(cache: Any, tag: LayerTag) -> None:
    set_tag(cache, tag)
    for inner in getattr(cache, "caches", ()):
        _tag_tree(inner, LayerTag(tag.model_type, tag.declared, tag.index, kind_of(inner)))


def kind_of(cache: Any) -> str:
    """A short name for the kind of layer that ``cache`` serves."""
    name = type(cache).__name__
    return _KINDS.get(name, name)


def set_tag(cache: Any, tag: LayerTag | None) -> None:
    """Tag one cache; a class that takes no attributes stays untagged."""
    if tag is not None and hasattr(cache, "__dict__"):
        setattr(cache, _ATTRIBUTE, tag)


def tag_of(cache: Any) -> LayerTag | None:
    """The tag of ``cache``, if it has one."""
    return getattr(cache, _ATTRIBUTE, None)
