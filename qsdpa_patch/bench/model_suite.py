"""The suite ``e2e``: decoding steps of a whole model, through mlx-lm's own ``generate_step``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
from mlx.nn.layers.quantized import quantize
from mlx_lm.models import llama

import qsdpa_patch
from qsdpa_patch.bench.cases import Case, random_rows, stock_format
from qsdpa_patch.bench.measurement import OURS, TimedPath
from qsdpa_patch.kernels.format import Format

__all__ = ["RANDOM_MODELS", "llama_shape", "model_paths", "random_llama"]

_SMALL_VOCABULARY = 4096
"""So small that the output layer of a model with few layers has no larger share than that of a large one."""

RANDOM_MODELS: dict[str, dict[str, int]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    }
}
"""Shapes that ``--model`` knows by name: such a model is made of random weights, and not loaded."""


def llama_shape(case: Case, layers: int) -> dict[str, int]:
    """The shape of a Llama of ``case``'s heads."""
    width = case.heads * case.key_dim
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": -(-width * 8 // 3 // 256) * 256,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": case.key_dim,
        "vocab_size": _SMALL_VOCABULARY,
    }


def random_llama(shape: dict[str, int], dtype: mx.Dtype) -> Any:
    """A Llama of that shape with random weights in 4 bits, and scales and norms in ``dtype``."""
    model = llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, **shape))
    model.set_dtype(dtype)
    quantize(model, group_size=64, bits=4)
    for layer in model.layers:
        mx.eval(layer.parameters())  # one at a time: together they would all be there unquantized
    mx.eval(model.parameters())
    return model


def model_paths(case: Case, kernels: str, model: Any) -> list[TimedPath]:
    """Steps of ``model`` over our quantized caches, mlx-lm's quantized ones, and plain ones; and without attention.

    The last is what the rest of a step takes, the update of plain caches included: no attention could do better. The
    caches are filled with random keys and values, since what is in them takes no part in the time of a step.
    """

    def patch() -> AbstractContextManager[None]:
        bits = (_bits(case.key_format), _bits(case.value_format))
        rotate = case.key_format.rotated
        return qsdpa_patch.enabled(kernels=kernels, key_bits=bits[0], value_bits=bits[1], rotate=rotate)

    def ours() -> list[Any]:
        return _quantized(model, case, {"bits": case.key_format.bits, "group_size": case.key_format.group_size})

    def stock() -> list[Any]:
        return _quantized(model, case, stock_format(case))

    return [
        _path(OURS, model, case, ours, patch),
        _path("mlx-lm quantized", model, case, stock),
        _path("unquantized", model, case, lambda: _filled(model, case)),
        _path("attention left out", model, case, lambda: _filled(model, case), lambda: _without_attention(model)),
    ]


@contextmanager
def _without_attention(model: Any) -> Iterator[None]:
    """The module of ``model`` with the queries for the output of its attention."""
    module = sys.modules[type(model).__module__]
    attention = getattr(module, "scaled_dot_product_attention", None)
    if attention is None:
        raise ValueError(f"{module.__name__} has no scaled_dot_product_attention to leave out")

    def queries_as_they_are(queries: mx.array, keys: Any, values: Any, **_: Any) -> mx.array:
        if values.shape[-1] != queries.shape[-1]:
            raise ValueError("values of another length than queries cannot be left out")
        return queries

    module.scaled_dot_product_attention = queries_as_they_are  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.scaled_dot_product_attention = attention  # type: ignore[attr-defined]


def _path(
    name: str,
    model: Any,
    case: Case,
    make: Callable[[], list[Any]],
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> TimedPath:
    caches: list[Any] = []
    prompt = mx.array([1])

    def prepare() -> None:
        caches.extend(make())

    def run(calls: int) -> None:
        generate_step = importlib.import_module("mlx_lm.generate").generate_step
        # mlx-lm's own stream is on the device that was the default when it was imported.
        stream = mx.default_stream(mx.default_device())
        # It runs the model once more than it yields tokens.
        for _ in generate_step(prompt, model, stream, max_tokens=calls - 1, prompt_cache=caches):
            pass
        mx.eval([cache.state for cache in caches])
        for cache in caches:
            cache.trim(cache.offset - case.context)

    return TimedPath(name, run, context=context, prepare=prepare)


def _quantized(model: Any, case: Case, format: dict[str, int]) -> list[Any]:
    """The filled caches, converted as mlx-lm does for ``kv_bits``: by the patch, where it is on."""
    caches = _filled(model, case)
    importlib.import_module("mlx_lm.generate").maybe_quantize_kv_cache(
        caches, quantized_kv_start=0, kv_group_size=format["group_size"], kv_bits=format["bits"]
    )
    mx.eval([cache.state for cache in caches])
    return caches


def _filled(model: Any, case: Case) -> list[Any]:
    """The model's caches with ``case.context`` random keys and values in each."""
    make_prompt_cache = importlib.import_module("mlx_lm.models.cache").make_prompt_cache
    probe: list[Any] = make_prompt_cache(model)
    caches: list[Any] = make_prompt_cache(model)
    model(mx.array([[1]]), cache=probe)
    for shapes, cache in zip(probe, caches):
        if getattr(shapes, "keys", None) is None or not hasattr(cache, "trim"):
            raise ValueError(f"the model keeps a {type(cache).__name__}, which cannot be filled with random rows")
        rows = [
            random_rows(1, x.shape[1], case.context, x.shape[3], x.dtype, spare=0) for x in (shapes.keys, shapes.values)
        ]
        cache.update_and_fetch(*rows)
        mx.eval(cache.state)
    return caches


def _bits(format: Format) -> int | str:
    return format.bits if format.is_affine else format.mode
