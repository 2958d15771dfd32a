"""The adapters in force: built in, registered by the user, and from entry points."""

from __future__ import annotations

import threading
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files

import wrapt

from qsdpa_patch.adapter import Adapter
from qsdpa_patch.logs import logger

__all__ = [
    "ENTRY_POINT_GROUP",
    "GENERIC",
    "adapter_for",
    "adapters",
    "hook_entry_points",
    "register_adapter",
    "registered_model_types",
    "unregister_adapter",
]

ENTRY_POINT_GROUP = "qsdpa_patch.adapters"
"""Entry points ``"<module that defines the model>" = "<package>:<adapter>"``, loaded when that module is imported."""

GENERIC = Adapter(name="generic", model_types=("*",))
"""Serves every model that no other adapter speaks for."""

_lock = threading.Lock()
_registered: dict[str, Adapter] = {}


@cache
def _built_in() -> dict[str, Adapter]:
    """The ``ADAPTER`` of every module in ``adapters/``, by name."""
    modules = sorted(
        entry.name.removesuffix(".py")
        for entry in files("qsdpa_patch").joinpath("adapters").iterdir()
        if entry.name.endswith(".py") and not entry.name.startswith("_")
    )
    found = [import_module(f"qsdpa_patch.adapters.{name}").ADAPTER for name in modules]
    return {adapter.name: adapter for adapter in found}


def register_adapter(adapter: Adapter) -> None:
    """Add ``adapter``; for its model types it takes precedence over those registered before, and the built-in ones.

    Raises:
        TypeError: when it is no :class:`Adapter`.
        ValueError: when its name is taken.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"{adapter!r} is {type(adapter).__name__}: give a qsdpa_patch.Adapter")
    with _lock:
        if adapter.name in _registered or adapter.name in _built_in() or adapter.name == GENERIC.name:
            raise ValueError(
                f"an adapter called {adapter.name!r} is registered already: choose another name, or call "
                f"unregister_adapter({adapter.name!r}) first if it is yours"
            )
        _registered[adapter.name] = adapter


def unregister_adapter(name: str) -> None:
    """Remove the adapter that was registered as ``name``.

    Raises:
        ValueError: when none is, or it is a built-in one.
    """
    with _lock:
        if name not in _registered:
            what = "is built in" if name in _built_in() else "is not registered"
            own = ", ".join(map(repr, _registered)) or "none"
            raise ValueError(f"adapter {name!r} {what}: registered are {own}")
        del _registered[name]


def adapters() -> tuple[Adapter, ...]:
    """All adapters: built-in ones, then registered ones, in order of rising precedence."""
    return (*_built_in().values(), *_registered.values())


def adapter_for(model_type: str) -> Adapter:
    """The adapter that speaks for ``model_type``; the generic one where none does."""
    for adapter in reversed(adapters()):
        if model_type in adapter.model_types:
            return adapter
    return GENERIC


def registered_model_types() -> frozenset[str]:
    """All model types that some adapter speaks for."""
    return frozenset(name for adapter in adapters() for name in adapter.model_types)


@cache
def hook_entry_points() -> None:
    """See to it that each entry point is loaded when its target is imported; once a process."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        target = point.name if "." in point.name else f"mlx_lm.models.{point.name}"
        wrapt.register_post_import_hook(_loader(point), target)


def _loader(point: EntryPoint):  # type: ignore[no-untyped-def]
    def load(_module: object) -> None:
        try:
            adapter = point.load()
            if adapter.name not in _registered:
                register_adapter(adapter)
        except Exception:  # an adapter must not make the import of its model fail
            logger.exception("the adapter of entry point %r could not be loaded; the generic one serves", point.name)

    return load
