"""The options of ``enable`` and the environment variables that mirror them, checked."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from qsdpa_patch.adapter_registry import registered_model_types
from qsdpa_patch.kernels.backends import CHOICES
from qsdpa_patch.kernels.format import AFFINE_BITS, FLOAT_FORMATS, Format

__all__ = [
    "DEFAULT_SETTINGS",
    "ROTATIONS",
    "Settings",
    "installed_model_types",
    "is_truthy",
    "resolve_settings",
]

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")
ROTATIONS = (False, True, "keys", "values")


@dataclass(frozen=True)
class Settings:
    """Options in force. See :func:`qsdpa_patch.enable` for what each does."""

    key_bits: int | str | None = None
    value_bits: int | str | None = None
    kernels: str = "auto"
    strict: bool = False
    models: frozenset[str] | None = None
    memory_budget: int = 256 << 20
    rotate: bool | str = False
    keep_windows: int = 0

    def covers(self, model_type: str) -> bool:
        """Whether calls and caches of ``model_type`` are ours."""
        return self.models is None or model_type in self.models

    def formats(self, bits: int, group_size: int) -> tuple[Format, Format]:
        """The formats of keys and values where mlx-lm asks for ``bits`` and ``group_size``."""
        key, value = (bits if own is None else own for own in (self.key_bits, self.value_bits))
        rotated_keys, rotated_values = self.rotate in (True, "keys"), self.rotate in (True, "values")
        return _format(key, group_size, rotated_keys), _format(value, group_size, rotated_values)


DEFAULT_SETTINGS = Settings()


def resolve_settings(
    *,
    key_bits: int | str | None = None,
    value_bits: int | str | None = None,
    kernels: str = "auto",
    strict: bool = False,
    models: Iterable[str] | None = None,
    rotate: bool | str = False,
    keep_windows: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Check the options of ``enable``; one left at its default takes its environment variable, where that is set.

    Raises:
        ValueError, TypeError: naming the option or the variable, what was given and what is taken.
    """
    env = os.environ if environment is None else environment
    if key_bits is None:
        key_bits = _bits_from_environment(env, "QSDPA_KEY_BITS")
    if value_bits is None:
        value_bits = _bits_from_environment(env, "QSDPA_VALUE_BITS")
    if kernels == "auto" and env.get("QSDPA_KERNELS"):
        kernels = _checked_kernels("QSDPA_KERNELS", env["QSDPA_KERNELS"].strip().lower())
    if not isinstance(strict, bool):
        raise TypeError(f"strict={strict!r}: give True or False")
    if not strict and "QSDPA_STRICT" in env:
        strict = is_truthy("QSDPA_STRICT", env["QSDPA_STRICT"])
    _checked_kernels("kernels", kernels)
    if rotate is False:
        rotate = _rotation_from_environment(env, "QSDPA_ROTATE")
    if keep_windows == 0 and env.get("QSDPA_KEEP_WINDOWS", "").strip():
        text = env["QSDPA_KEEP_WINDOWS"].strip()
        keep_windows = _checked_rows("QSDPA_KEEP_WINDOWS", int(text) if text.isdigit() else text)
    if strict and kernels == "ops":
        raise ValueError("strict=True refuses every call that kernels='ops' asks for: choose one of them")
    return Settings(
        key_bits=_checked_bits("key_bits", key_bits),
        value_bits=_checked_bits("value_bits", value_bits),
        kernels=kernels,
        strict=strict,
        models=None if models is None else _checked_models(models),
        rotate=_checked_rotation("rotate", rotate),
        keep_windows=_checked_rows("keep_windows", keep_windows),
    )


def is_truthy(name: str, text: str) -> bool:
    """The boolean value of environment variable ``name``."""
    value = text.strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name}={text!r} is not a switch: set it to 1 or 0")


@cache
def installed_model_types() -> frozenset[str]:
    """The model types of the installed mlx-lm: its model modules, and the names that it maps to them.

    Found without importing mlx-lm.
    """
    spec = find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    folders = [Path(location) / "models" for location in spec.submodule_search_locations]
    return frozenset(path.stem for folder in folders for path in folder.glob("*.py") if path.stem != "__init__")


def _checked_bits(name: str, bits: int | str | None) -> int | str | None:
    if bits is None or (isinstance(bits, str) and bits in FLOAT_FORMATS):
        return bits
    if isinstance(bits, int) and not isinstance(bits, bool) and bits in AFFINE_BITS:
        return bits
    raise ValueError(
        f"{name}={bits!r} is not supported: use one of {', '.join(map(str, AFFINE_BITS))}, "
        f"or a format: {', '.join(map(repr, FLOAT_FORMATS))}"
    )


def _bits_from_environment(env: Mapping[str, str], name: str) -> int | str | None:
    text = env.get(name, "").strip().lower()
    if not text:
        return None
    return _checked_bits(name, int(text) if text.isdigit() else text)


def _checked_rotation(name: str, rotate: bool | str) -> bool | str:
    if isinstance(rotate, (bool, str)) and rotate in ROTATIONS:
        return rotate
    raise ValueError(f"{name}={rotate!r} is unknown: use one of {', '.join(map(repr, ROTATIONS))}")


def _rotation_from_environment(env: Mapping[str, str], name: str) -> bool | str:
    text = env.get(name, "").strip().lower()
    if text in (*_TRUE, *_FALSE):
        return text in _TRUE
    if text in ROTATIONS:
        return text
    raise ValueError(f"{name}={env[name]!r} is unknown: use 1, 0, keys or values")


def _checked_rows(name: str, rows: object) -> int:
    if isinstance(rows, int) and not isinstance(rows, bool) and rows >= 0:
        return rows
    raise ValueError(f"{name}={rows!r} is no number of rows: give 0 or more")


def _checked_kernels(name: str, kernels: str) -> str:
    if kernels not in CHOICES:
        raise ValueError(f"{name}={kernels!r} is unknown: use one of {', '.join(map(repr, CHOICES))}")
    return kernels


def _checked_models(models: Iterable[str]) -> frozenset[str]:
    if isinstance(models, str):
        raise TypeError(f"models={models!r}: give a list of model types, [{models!r}]")
    chosen = frozenset(models)
    if not chosen:
        raise ValueError("models=[] would cover nothing: leave it out for all models, or name some")
    known = installed_model_types() | registered_model_types()
    for name in sorted(chosen - known, key=str):
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f": did you mean {' or '.join(map(repr, near))}?" if near else f", which has {len(known)} others"
        raise ValueError(f"models: {name!r} is no model type of the installed mlx-lm{hint}")
    return chosen


def _format(bits: int | str, group_size: int, rotated: bool) -> Format:
    if isinstance(bits, str):
        return Format.named(bits, rotated=rotated)
    return Format.affine(bits, group_size, rotated=rotated)
