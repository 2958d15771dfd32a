"""A tiny model of any architecture of mlx-lm, with random weights that make attention matter."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.nn.layers.linear import Linear
from mlx.utils import tree_flatten, tree_unflatten

from qsdpa_patch.architectures.sizes import COMMON, SIZES, TEXT_CLASSES, UNSCALED

__all__ = ["build", "model_arguments"]

_GAIN = 1.5
_DRAWN = ("sinks", "attention_sink_bias", "conv_k", "conv_v", "lm_head")
"""Parameters without a ``weight`` in their name that mlx-lm leaves at zero until weights are loaded."""


def build(architecture: str, seed: int = 0, dtype: mx.Dtype = mx.float32) -> Any:
    """A model of ``architecture``, a module under ``mlx_lm.models``; its weights are lazy.

    Weights have a variance of ``_GAIN ** 2`` over the fan-in, twice what keeps activations level: scores then spread
    over several units, so that the softmax prefers some keys to others.

    Raises:
        KeyError, TypeError: :data:`SIZES` lacks the architecture, or an argument of its.
    """
    module: Any = importlib.import_module(f"mlx_lm.models.{architecture}")
    mx.random.seed(seed)
    with _plain_linear_layers(module):
        model = module.Model(module.ModelArgs.from_dict(model_arguments(architecture, module)))
    if architecture == "phi3small":  # it writes to logits beyond a small vocabulary
        model._dummy_tokenizer_ids = mx.array([], mx.int32)
    _draw_weights(model, scaled=architecture not in UNSCALED)
    model.set_dtype(dtype)
    model.eval()
    return model


@contextmanager
def _plain_linear_layers(module: Any) -> Iterator[None]:
    """Linear layers in place of ternary ones, whose packed weights are not drawn: they would all be the same.

    They exist as a Metal kernel only, too. Attention is the same.
    """
    ternary = getattr(module, "BitLinear", None)
    if ternary is not None:
        module.BitLinear = Linear
    try:
        yield
    finally:
        if ternary is not None:
            module.BitLinear = ternary


def model_arguments(architecture: str, module: Any) -> dict[str, Any]:
    """The arguments of ``module.ModelArgs``."""
    own = SIZES[architecture]
    arguments = _arguments_of(module.ModelArgs, architecture, own)
    if "text_config" in own:
        inner, _, name = TEXT_CLASSES[architecture].partition(".")
        text_class = getattr(importlib.import_module(f"mlx_lm.models.{inner}"), name)
        arguments["text_config"] = _arguments_of(text_class, inner, own["text_config"])
    return arguments


def _arguments_of(cls: type, model_type: str, own: dict[str, Any]) -> dict[str, Any]:
    """Arguments for every field of the dataclass ``cls`` that has a value here; its own defaults serve the rest."""
    values = {**COMMON, "model_type": model_type, **own}
    return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}


def _draw_weights(model: Any, *, scaled: bool) -> None:
    drawn = []
    parameters: Any = tree_flatten(model.parameters())
    for name, parameter in parameters:
        leaf = name.rpartition(".")[2]
        if leaf in _DRAWN:
            drawn.append((name, mx.random.normal(parameter.shape)))
        elif name.endswith("k_norm.weight") and not scaled:
            drawn.append((name, mx.full(parameter.shape, 2 / math.sqrt(parameter.size))))
        elif leaf == "weight" and parameter.ndim >= 2 and mx.issubdtype(parameter.dtype, mx.floating):
            drawn.append((name, _scale(name, parameter) * mx.random.normal(parameter.shape)))
    model.update(tree_unflatten(drawn))


def _scale(name: str, weight: mx.array) -> float:
    """The standard deviation for the weight called ``name``."""
    if "conv" in name:
        return _GAIN / math.sqrt(math.prod(weight.shape[1:]))
    if "embed_q" in name:  # absorbed MLA: it takes latents to keys by its transpose
        return _GAIN / math.sqrt(weight.shape[-2])
    return 0.1 if "embed" in name else _GAIN / math.sqrt(weight.shape[-1])
