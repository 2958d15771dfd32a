"""Replacing attributes and putting them back, to the very object.

It knows nothing of mlx-lm: what is replaced is in :mod:`~qsdpa_patch.targets`.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from qsdpa_patch.errors import QSDPAWarning

__all__ = ["MISSING", "Patcher"]

MISSING: Any = object()
"""Stands for an attribute that was not there."""


@dataclass(frozen=True)
class _Change:
    owner: Any
    name: str
    original: Any
    replacement: Any


@dataclass
class Patcher:
    """Records each change of an attribute, and undoes them in reverse order."""

    _changes: list[_Change] = field(default_factory=list)
    _replacements: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def replace(self, module: ModuleType, path: str, make: Callable[[Any], Any]) -> Any:
        """Replace ``module.path`` (dotted, for a method) by ``make(original)``; returns the original.

        The same path of the same module gives the same replacement until :meth:`undo`.
        """
        *outer, name = path.split(".")
        owner: Any = module
        for part in outer:
            owner = getattr(owner, part)
        with self._lock:
            key = f"{module.__name__}.{path}"
            if key in self._replacements:
                return self._replacements[key][0]
            original = vars(owner)[name]
            replacement = make(original)
            _copy_identity(original, replacement)
            self._set(owner, name, replacement)
            self._replacements[key] = (original, replacement)
            return original

    def add(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name``, present or not."""
        with self._lock:
            if vars(owner).get(name, MISSING) is not value:
                self._set(owner, name, value)

    def sweep(self, original: Any, name: str) -> None:
        """Replace ``name`` in every loaded module that holds ``original`` under it.

        Name and identity both have to match: another function of that name is left alone.
        """
        with self._lock:
            replacement = next(new for old, new in self._replacements.values() if old is original)
            for module in list(sys.modules.values()):
                if _namespace(module).get(name) is original:
                    self._set(module, name, replacement)

    def undo(self) -> None:
        """Put everything back. An attribute that someone else has changed meanwhile stays, with a warning."""
        with self._lock:
            for change in reversed(self._changes):
                self._undo_change(change)
            for original, replacement in self._replacements.values():
                _sweep_late_imports(replacement, original)
            self._changes.clear()
            self._replacements.clear()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._changes.append(_Change(owner, name, vars(owner).get(name, MISSING), value))
        setattr(owner, name, value)

    def _undo_change(self, change: _Change) -> None:
        if vars(change.owner).get(change.name, MISSING) is not change.replacement:
            where = getattr(change.owner, "__name__", repr(change.owner))
            warnings.warn(
                f"{where}.{change.name} was changed by someone else since enable() and is left as it is",
                QSDPAWarning,
                stacklevel=4,
            )
        elif change.original is MISSING:
            delattr(change.owner, change.name)
        else:
            setattr(change.owner, change.name, change.original)


def _sweep_late_imports(replacement: Any, original: Any) -> None:
    """Modules imported while the patch was on hold the replacement by its name: give them the original."""
    name = original.__name__
    for module in list(sys.modules.values()):
        if _namespace(module).get(name) is replacement:
            setattr(module, name, original)


def _namespace(module: Any) -> dict[str, Any]:
    """A module's attributes, without triggering lazy ones; things that only pose as modules have none."""
    return vars(module) if isinstance(module, ModuleType) else {}


def _copy_identity(original: Any, replacement: Any) -> None:
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(replacement, attribute, getattr(original, attribute))
    replacement.__wrapped__ = original
