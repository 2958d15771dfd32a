"""``enable`` and ``disable``: when what is patched."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import mlx.core as mx
import wrapt
from packaging.version import Version

from qsdpa_patch.adapter_registry import hook_entry_points
from qsdpa_patch.dispatcher import router
from qsdpa_patch.errors import QSDPAWarning
from qsdpa_patch.logs import configure_from_environment, logger
from qsdpa_patch.patcher import Patcher
from qsdpa_patch.row_gathering import GATHERING_MODULES, gathering_namespace
from qsdpa_patch.settings import DEFAULT_SETTINGS, resolve_settings
from qsdpa_patch.targets import TARGETS, TESTED_VERSIONS, Target

__all__ = ["disable", "enable", "enabled", "is_enabled", "untested_versions"]

_CACHE_MODULE = "mlx_lm.models.cache"
_PATCHED_MODULES = frozenset({*(target.module for target in TARGETS), *GATHERING_MODULES})

_lock = threading.RLock()
_patcher = Patcher()
_enabled = False


def enable(
    *,
    key_bits: int | str | None = None,
    value_bits: int | str | None = None,
    kernels: str = "auto",
    strict: bool = False,
    models: Iterable[str] | None = None,
    rotate: bool | str = False,
    keep_windows: int = 0,
) -> None:
    """Patch mlx-lm, whether it is imported already or later. A second call updates the options.

    Args:
        key_bits, value_bits: what to quantize keys and values to where mlx-lm quantizes its cache (``kv_bits``,
            ``--kv-bits``): bits 2, 3, 4, 5, 6 or 8, or ``"mxfp4"``, ``"mxfp8"``, ``"nvfp4"``. By default as mlx-lm
            was asked. They do not turn quantization on by themselves.
        kernels: ``"auto"`` (by MLX's default device), ``"metal"``, ``"cuda"``, ``"cpu"``, or ``"ops"`` for plain ops.
        strict: a call that no fused kernel takes raises :class:`FallbackError`, with the reason. Long prompts, which
            take the route ``prefill``, are not affected.
        models: cover only these mlx-lm model types, ``["llama", "qwen3"]`` say. By default all.
        rotate: keys and values are rotated by a Hadamard transform before they are quantized, which keeps text closer
            to the unquantized at 4 bits and below, for some time at each token. ``"keys"`` or ``"values"``: only these.
        keep_windows: leave layers unquantized whose sliding window, or chunk, has at most this many rows. Their caches
            do not grow, so that there is little to save. By default none.

    An option left at its default takes its environment variable where that is set: ``QSDPA_KEY_BITS``,
    ``QSDPA_VALUE_BITS``, ``QSDPA_KERNELS``, ``QSDPA_STRICT``, ``QSDPA_ROTATE``,
    ``QSDPA_KEEP_WINDOWS``.

    Raises:
        ValueError, TypeError: for an option that is not taken. Nothing is patched then, or changed.

    Warns:
        QSDPAWarning: when mlx or mlx-lm are not of a tested version; only what still fits is patched then.
    """
    global _enabled
    settings = resolve_settings(
        key_bits=key_bits,
        value_bits=value_bits,
        kernels=kernels,
        strict=strict,
        models=models,
        rotate=rotate,
        keep_windows=keep_windows,
    )
    configure_from_environment()
    with _lock:
        router.update(settings)
        if _enabled:
            return
        for message in untested_versions():
            warnings.warn(f"{message}: only what still fits is patched", QSDPAWarning, stacklevel=2)
        _enabled = True
        for module in _PATCHED_MODULES:
            if module in sys.modules:
                _patch_module(sys.modules[module])
    _hook_imports()
    hook_entry_points()


def disable() -> None:
    """Put every patched attribute back to the very object that was there. Caches made meanwhile go on working."""
    global _enabled
    with _lock:
        if not _enabled:
            return
        _enabled = False
        _patcher.undo()
        router.update(DEFAULT_SETTINGS)


@contextmanager
def enabled(
    *,
    key_bits: int | str | None = None,
    value_bits: int | str | None = None,
    kernels: str = "auto",
    strict: bool = False,
    models: Iterable[str] | None = None,
    rotate: bool | str = False,
    keep_windows: int = 0,
) -> Iterator[None]:
    """:func:`enable` for a ``with`` block. What was in force before comes back afterwards."""
    with _lock:
        before, was_enabled = router.settings, _enabled
    enable(
        key_bits=key_bits,
        value_bits=value_bits,
        kernels=kernels,
        strict=strict,
        models=models,
        rotate=rotate,
        keep_windows=keep_windows,
    )
    try:
        yield
    finally:
        if was_enabled:
            router.update(before)
        else:
            disable()


def is_enabled() -> bool:
    """Whether the patch is on."""
    return _enabled


def untested_versions() -> list[str]:
    """A message for each of mlx and mlx-lm that is missing or outside the tested range."""
    messages = []
    for distribution, (first, end) in TESTED_VERSIONS.items():
        try:
            found = version(distribution)
        except PackageNotFoundError:
            messages.append(f"{distribution} is not installed")
            continue
        if not Version(first) <= Version(found) < Version(end):
            messages.append(f"{distribution} {found} is not tested (tested: {first} up to, not including, {end})")
    return messages


@cache
def _hook_imports() -> None:
    """Patch each module right after its import, before anyone imports from it; once a process."""
    for module in sorted(_PATCHED_MODULES):
        wrapt.register_post_import_hook(_patch_if_enabled, module)


def _patch_if_enabled(module: ModuleType) -> None:
    try:
        with _lock:
            if _enabled:
                _patch_module(module)
    except Exception:  # an exception here would make the import of mlx-lm fail
        logger.exception("%s could not be patched", module.__name__)


def _patch_module(module: ModuleType) -> None:
    """Replace the targets of ``module``, and their copies in modules that imported them by name."""
    for target in TARGETS:
        if target.module == module.__name__:
            _patch_target(module, target)
    if module.__name__ == _CACHE_MODULE:
        _add_saved_classes(module)
    if module.__name__ in GATHERING_MODULES and vars(module).get("mx") is mx:
        _patcher.add(module, "mx", gathering_namespace())


def _add_saved_classes(cache_module: ModuleType) -> None:
    """Let ``load_prompt_cache`` find the quantized caches, which it looks up by name in its own module."""
    from qsdpa_patch.caches import SAVED_CLASSES

    for name, cls in SAVED_CLASSES.items():
        _patcher.add(cache_module, name, cls)


def _patch_target(module: ModuleType, target: Target) -> None:
    original = target.find(module)
    reason = "it is not there" if original is None else target.mismatch(original)
    if reason:
        warnings.warn(f"{target.name} is not patched: {reason}", QSDPAWarning, stacklevel=2)
        return
    original = _patcher.replace(module, target.attribute, target.make)
    if target.sweep:
        _patcher.sweep(original, target.attribute)
