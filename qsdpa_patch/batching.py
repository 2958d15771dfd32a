"""Batches and the server over quantized caches: the replacements in ``BatchGenerator`` and ``mlx_lm.server``.

mlx-lm has no ``kv_bits`` for batches, and its server stops batching where ``--kv-bits`` is given. With the patch
a ``BatchGenerator`` takes ``kv_bits`` and ``kv_group_size``, and the server passes its own. The sequences of a batch
share one cache per layer, so all of them are quantized from their first token on, whatever ``--quantized-kv-start``
says.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from qsdpa_patch.cache_creation import quantize_cache
from qsdpa_patch.dispatcher import router
from qsdpa_patch.layer_tags import declared_model_type, module_model_type, tag_caches
from qsdpa_patch.logs import logger

__all__ = ["make_batch_generator_init", "make_insert_segments", "make_is_batchable", "make_server_loop"]

_server_quantization: ContextVar[tuple[int | None, int]] = ContextVar("server_quantization", default=(None, 64))
"""``kv_bits`` and ``kv_group_size`` of the server whose generation loop this thread runs."""


def make_batch_generator_init(original: Callable[..., None]) -> Callable[..., None]:
    """A replacement for ``BatchGenerator.__init__`` that also takes ``kv_bits`` and ``kv_group_size``."""

    def __init__(
        self: Any, model: Any, *, kv_bits: int | None = None, kv_group_size: int | None = None, **options: Any
    ) -> None:
        default_bits, default_group_size = _server_quantization.get()
        bits = default_bits if kv_bits is None else kv_bits
        group_size = default_group_size if kv_group_size is None else kv_group_size
        if bits is not None:
            router.settings.formats(bits, group_size)  # raises, before anything is made, where there is no such format
        original(self, model, **options)
        self._qsdpa_quantization = bits, group_size

    return __init__


def make_insert_segments(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """A replacement for ``BatchGenerator.insert_segments`` that quantizes the caches of new sequences."""

    def insert_segments(
        self: Any,
        segments: list[list[list[int]]],
        max_tokens: list[int] | None = None,
        caches: list[list[Any] | None] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> list[int]:
        bits, group_size = getattr(self, "_qsdpa_quantization", (None, 64))
        if bits is not None and _covers(self.model):
            given = [None] * len(segments) if caches is None else caches
            caches = [_quantized(self, cache, bits, group_size) for cache in given]
        return original(self, segments, max_tokens, caches, *args, **kwargs)

    return insert_segments


def make_is_batchable(original: Callable[..., bool]) -> Callable[..., bool]:
    """A replacement for the server's ``_is_batchable``, for which ``--kv-bits`` is no obstacle.

    A format that there is not stays one: such a request is served alone, where it fails without stopping the server.
    """

    def _is_batchable(self: Any, args: Any) -> bool:
        bits = self.cli_args.kv_bits
        model = self.model_provider.model
        if bits is None or (model is not None and not _covers(model)):
            return original(self, args)
        try:
            router.settings.formats(bits, self.cli_args.kv_group_size)
        except ValueError:
            return original(self, args)
        return bool(self.model_provider.is_batchable and args.seed is None)

    return _is_batchable


def make_server_loop(original: Callable[..., None]) -> Callable[..., None]:
    """A replacement for the server's generation loop that hands ``--kv-bits`` to the batches it makes."""

    def _generate(self: Any) -> None:
        bits, group_size = self.cli_args.kv_bits, self.cli_args.kv_group_size
        if bits is not None:
            try:
                router.settings.formats(bits, group_size)
            except ValueError as error:  # the requests fail one by one; say why where the operator looks
                logger.error("--kv-bits %s --kv-group-size %s: %s", bits, group_size, error)
        token = _server_quantization.set((bits, group_size))
        try:
            original(self)
        finally:
            _server_quantization.reset(token)

    return _generate


def _quantized(generator: Any, cache: list[Any] | None, bits: int, group_size: int) -> list[Any]:
    """The quantized caches of one sequence: new ones, or those it came with."""
    if cache is None:
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(generator.model, generator.max_kv_size)
        tag_caches(generator.model, cache)
    return [quantize_cache(layer, bits, group_size, index) for index, layer in enumerate(cache)]


def _covers(model: Any) -> bool:
    covers = router.settings.covers
    return covers(module_model_type(model)) or covers(declared_model_type(model))
