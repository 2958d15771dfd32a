"""What is patched in mlx-lm, as data: names, their replacements, and the versions that were tested."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["TARGETS", "TESTED_VERSIONS", "Target", "source_hash"]

TESTED_VERSIONS = {"mlx": ("0.32.3", "0.33"), "mlx-lm": ("0.32.2", "0.33")}
"""``distribution -> (first tested, first not tested)``."""


@dataclass(frozen=True)
class Target:
    """One attribute that is replaced while the patch is on.

    module: where it is defined. attribute: its name there, ``"Class.method"`` for a method.
    factory: ``"module:function"``; the function takes the original and returns the replacement. It is imported when
        the target is patched, because what deals with caches needs mlx-lm, which ``import qsdpa_patch`` does not.
    parameters: the names that it must have for the replacement to fit.
    sha256: first 16 digits of the hash of its source in the newest tested mlx-lm, for the drift test.
    sweep: whether other modules import it by name, so that their copies are replaced too.
    """

    module: str
    attribute: str
    factory: str
    parameters: tuple[str, ...]
    sha256: str
    sweep: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"

    def make(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement for ``original``."""
        module, _, function = self.factory.partition(":")
        replacement: Callable[..., Any] = getattr(import_module(module), function)(original)
        return replacement

    def find(self, module: ModuleType) -> Any:
        """The attribute as it is now in ``module``, or ``None``."""
        owner, _, name = self.attribute.rpartition(".")
        holder = getattr(module, owner, None) if owner else module
        return None if holder is None else vars(holder).get(name)

    def mismatch(self, original: Any) -> str:
        """Why the replacement does not fit ``original``, or an empty string."""
        try:
            found = tuple(inspect.signature(original).parameters)
        except (TypeError, ValueError):
            return "it is not a Python function"
        return "" if found == self.parameters else f"it takes {found}, not {self.parameters}"


def source_hash(function: Callable[..., Any]) -> str:
    """The hash of ``function``'s source, as recorded in :data:`TARGETS`."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


_TO_QUANTIZED = "qsdpa_patch.cache_creation:make_to_quantized", ("self", "group_size", "bits")

TARGETS = (
    Target(
        "mlx_lm.models.base",
        "scaled_dot_product_attention",
        "qsdpa_patch.dispatcher:make_dispatcher",
        ("queries", "keys", "values", "cache", "scale", "mask", "sinks"),
        "8deba4a8a8fb4e29",
        sweep=True,
    ),
    Target(
        "mlx_lm.models.cache",
        "make_prompt_cache",
        "qsdpa_patch.cache_creation:make_prompt_cache_maker",
        ("model", "max_kv_size"),
        "ae8ee8ce5ac69f2a",
        sweep=True,
    ),
    Target("mlx_lm.models.cache", "KVCache.to_quantized", *_TO_QUANTIZED, "7157a60885a62ee0"),
    Target("mlx_lm.models.cache", "RotatingKVCache.to_quantized", *_TO_QUANTIZED, "f2cca516c7de5950"),
    Target("mlx_lm.models.cache", "BatchRotatingKVCache.to_quantized", *_TO_QUANTIZED, "1e358ff549613a0c"),
    Target(
        "mlx_lm.generate",
        "maybe_quantize_kv_cache",
        "qsdpa_patch.cache_creation:make_maybe_quantize_kv_cache",
        ("prompt_cache", "quantized_kv_start", "kv_group_size", "kv_bits"),
        "ecf45153d6a6fc24",
        sweep=True,
    ),
    Target(
        "mlx_lm.generate",
        "BatchGenerator.__init__",
        "qsdpa_patch.batching:make_batch_generator_init",
        (
            "self",
            "model",
            "max_tokens",
            "stop_tokens",
            "sampler",
            "logits_processors",
            "completion_batch_size",
            "prefill_batch_size",
            "prefill_step_size",
            "max_kv_size",
            "stream",
        ),
        "80fdd7d3fc89c375",
    ),
    Target(
        "mlx_lm.generate",
        "BatchGenerator.insert_segments",
        "qsdpa_patch.batching:make_insert_segments",
        (
            "self",
            "segments",
            "max_tokens",
            "caches",
            "all_tokens",
            "samplers",
            "logits_processors",
            "stop_sequences",
        ),
        "509f959621fc26b5",
    ),
    Target(
        "mlx_lm.server",
        "ResponseGenerator._is_batchable",
        "qsdpa_patch.batching:make_is_batchable",
        ("self", "args"),
        "b2af8bdb88cab0d4",
    ),
    Target(
        "mlx_lm.server",
        "ResponseGenerator._generate",
        "qsdpa_patch.batching:make_server_loop",
        ("self",),
        "3a4259353eae5341",
    ),
)
