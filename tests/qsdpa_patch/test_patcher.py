"""Replacing attributes and putting them back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from qsdpa_patch.errors import QSDPAWarning
from qsdpa_patch.patcher import Patcher


@pytest.fixture
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """A module that defines ``f`` and a class, and one that imported ``f`` by name; another function called ``f``."""
    source, importer, other = (ModuleType(f"qsdpa_test_{name}") for name in ("source", "importer", "other"))
    exec("def f(x):\n    'doc'\n    return x\nclass C:\n    def m(self):\n        return 1\n", source.__dict__)
    importer.f = source.f  # type: ignore[attr-defined]
    exec("def f(x):\n    return -x", other.__dict__)
    for module in (source, importer, other):
        sys.modules[module.__name__] = module
    yield source, importer
    for module in (source, importer, other):
        del sys.modules[module.__name__]


def make(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any) -> Any:
        return "patched"

    return replacement


def test_replace_sweep_undo(modules: tuple[Any, Any]) -> None:
    source, importer = modules
    f, m, other = source.f, source.C.m, sys.modules["qsdpa_test_other"].f
    patcher = Patcher()
    original = patcher.replace(source, "f", make)
    patcher.sweep(original, "f")
    patcher.replace(source, "C.m", make)
    assert source.f(1) == importer.f(1) == source.C().m() == "patched"
    assert (source.f.__name__, source.f.__doc__, source.f.__wrapped__) == ("f", "doc", f)
    assert sys.modules["qsdpa_test_other"].f is other
    patcher.undo()
    assert source.f is f
    assert importer.f is f
    assert source.C.m is m


def test_replacing_twice_is_once(modules: tuple[Any, Any]) -> None:
    source, _ = modules
    f = source.f
    patcher = Patcher()
    assert patcher.replace(source, "f", make) is patcher.replace(source, "f", make) is f
    patcher.undo()
    assert source.f is f


def test_modules_imported_while_patched_get_the_original_back(modules: tuple[Any, Any]) -> None:
    source, importer = modules
    f = source.f
    patcher = Patcher()
    patcher.replace(source, "f", make)
    importer.f = source.f
    patcher.undo()
    assert importer.f is f


def test_someone_elses_change_is_left_alone_with_a_warning(modules: tuple[Any, Any]) -> None:
    source, importer = modules
    f = source.f
    patcher = Patcher()
    patcher.sweep(patcher.replace(source, "f", make), "f")
    theirs = source.f = lambda x: "theirs"
    with pytest.warns(QSDPAWarning, match=r"qsdpa_test_source\.f was changed by someone else"):
        patcher.undo()
    assert source.f is theirs
    assert importer.f is f


def test_an_added_attribute_is_taken_away_and_a_shadowed_one_comes_back(modules: tuple[Any, Any]) -> None:
    source, _ = modules
    f = source.f
    patcher = Patcher()
    patcher.add(source, "new", 1)
    patcher.add(source, "f", 2)
    patcher.undo()
    assert not hasattr(source, "new")
    assert source.f is f
