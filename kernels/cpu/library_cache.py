"""Shared libraries that are compiled at first use, kept on disk.

A file is named by a key, a hash of all that made it, and by a hash of its own bytes, so that a damaged one is seen
before it is loaded. Files appear by a rename: several processes may start at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

__all__ = ["cache_directory", "digest", "find_or_build", "writable_directory"]

_log = logging.getLogger(__name__)
_Loaded = TypeVar("_Loaded")


def cache_directory() -> Path:
    """Where compiled libraries are kept: ``$QSDPA_CACHE_DIR``, or the user's cache folder."""
    if chosen := os.environ.get("QSDPA_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qsdpa_patch"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsdpa_patch"


def find_or_build(
    key: str, build: Callable[[Path], Path], load: Callable[[Path], _Loaded]
) -> tuple[_Loaded, Path, float]:
    """What ``load`` makes of the library of ``key``, the library's file, and the seconds it took to build: 0 if cached.

    Args:
        key: hash of all that the library depends on.
        build: makes it, in the folder that it is given, and returns the file.
        load: loads it; a cached file with which this raises ``OSError`` is built again.

    Raises:
        Exception: whatever ``build`` raises.
        OSError: what was built just now cannot be loaded.
    """
    directory = writable_directory()
    for path in sorted(directory.glob(f"{key}-*.so")):
        if path.stem.rpartition("-")[2] == digest(path.read_bytes()):
            try:
                return load(path), path, 0.0
            except OSError as error:
                _log.warning("%s cannot be loaded and is built again: %s", path, error)
        else:
            _log.warning("%s is damaged and is built again", path)
        path.unlink(missing_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as folder:
        built = build(Path(folder))
        path = directory / f"{key}-{digest(built.read_bytes())}.so"
        os.replace(built, path)
    return load(path), path, time.perf_counter() - start


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def writable_directory() -> Path:
    """The cache directory, or where it cannot be written, a temporary one that lives as long as the process."""
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        temporary = _temporary_directory()
        _log.warning("%s cannot be written (%s): compiled CPU kernels are kept for this process only", directory, error)
        return temporary


@cache
def _temporary_directory() -> Path:
    holder = tempfile.TemporaryDirectory(prefix="qsdpa-")
    _keep.append(holder)
    return Path(holder.name)


_keep: list[tempfile.TemporaryDirectory[str]] = []
