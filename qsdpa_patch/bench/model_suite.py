"""The suite ``e2e``: decoding steps of a whole model, through mlx-lm's own ``generate_step``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
from mlx.nn.layers.quantized import quantize
from mlx_lm.models import llama

import qsdpa_patch
from qsdpa_patch.bench.cases import Case, random_rows, stock_format
from qsdpa_patch.bench.measurement import OURS, TimedPath
from qsdpa_patch.kernels.format import Format

__all__ = ["model_paths", "random_llama"]

_VOCABULARY = 4096
"""Small, so that the output layer of a model with few layers has no larger share than that of a large one."""


def random_llama(case: Case, layers: int) -> Any:
    """A Llama of ``case``'s heads with random weights in 4 bits."""
    width = case.heads * case.key_dim
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=-(-width * 8 // 3 // 256) * 256,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_heads,
            head_dim=case.key_dim,
            rms_norm_eps=1e-5,
            vocab_size=_VOCABULARY,
        )
    )
    model.set_dtype(case.dtype)
    quantize(model, group_size=64, bits=4)
    mx.eval(model.parameters())
    return model


def model_paths(case: Case, kernels: str, model: Any) -> list[TimedPath]:
    """Steps of ``model`` over our quantized caches, mlx-lm's quantized ones, and plain ones.

    The caches are filled with random keys and values, since what is in them takes no part in the time of a step.
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
    ]


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
