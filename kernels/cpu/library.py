"""The C kernels as a shared library: compiled for this host once, cached on disk, loaded once in a process.

A cached file is named by a hash of all that made it (sources, compiler, flags, CPU) and by a hash of its own bytes, so
that a damaged one is seen before it is loaded. Files appear by a rename: several processes may start at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.resources
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

from qsdpa_patch.kernels.cpu import compiler as compilers
from qsdpa_patch.kernels.cpu.compiler import Compiler, CompilerError

__all__ = ["CompilerError", "Library", "cache_directory", "load_library", "loaded_library"]

_log = logging.getLogger(__name__)
_MAIN = "kernels.c"


@dataclass(frozen=True)
class Library:
    """The loaded library and how it came about. ``compile_seconds`` is 0 where the cache had it."""

    functions: ctypes.CDLL
    locked_functions: ctypes.PyDLL
    path: Path
    compiler: Compiler
    compile_seconds: float

    def read_views(self, arrays: Sequence[mx.array | None], fields: ctypes.Array[ctypes.c_int64]) -> None:
        """Write addresses and strides of ``arrays`` (``None``: zeros) to the start of ``fields``, five numbers each.

        Waits for arrays that are still being evaluated. They are valid as long as the arrays live: MLX never moves the
        buffer of an evaluated array.
        """
        objects = (ctypes.c_void_p * len(arrays))(*(None if a is None else id(a) for a in arrays))
        failed = self.locked_functions.qsdpa_views(objects, len(arrays), fields, _GET_BUFFER, _RELEASE_BUFFER)
        if failed >= 0:
            raise ValueError(f"input {failed} has more than four axes")


_lock = threading.Lock()
_outcome: Library | CompilerError | None = None


def load_library() -> Library:
    """The library, compiled at the first call on this host.

    Raises:
        CompilerError: no compiler, or it failed; the same one for the rest of the process.
    """
    global _outcome
    with _lock:
        if _outcome is None:
            try:
                _outcome = find_or_build(compilers.find_compiler())
            except (CompilerError, OSError) as error:
                _outcome = error if isinstance(error, CompilerError) else CompilerError(str(error))
    if isinstance(_outcome, CompilerError):
        raise _outcome
    return _outcome


def loaded_library() -> Library | None:
    """The library if this process has loaded it."""
    return _outcome if isinstance(_outcome, Library) else None


def cache_directory() -> Path:
    """Where compiled libraries are kept: ``$QSDPA_CACHE_DIR``, or the user's cache folder."""
    if chosen := os.environ.get("QSDPA_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qsdpa_patch"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsdpa_patch"


def find_or_build(compiler: Compiler) -> Library:
    sources = _sources()
    key = _key(sources, compiler)
    directory = _writable_directory()
    for path in sorted(directory.glob(f"{key}-*.so")):
        if path.stem.rpartition("-")[2] == _digest(path.read_bytes()):
            try:
                return Library(*_open(path), path, compiler, 0.0)
            except OSError as error:
                _log.warning("%s cannot be loaded and is built again: %s", path, error)
        else:
            _log.warning("%s is damaged and is built again", path)
        path.unlink(missing_ok=True)
    start = time.perf_counter()
    path = _build(sources, compiler, directory, key)
    return Library(*_open(path), path, compiler, time.perf_counter() - start)


def _build(sources: dict[str, str], compiler: Compiler, directory: Path, key: str) -> Path:
    with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as build:
        for name, text in sources.items():
            Path(build, name).write_text(text)
        built = Path(build, "kernels.so")
        compiler.compile(Path(build, _MAIN), built)
        path = directory / f"{key}-{_digest(built.read_bytes())}.so"
        os.replace(built, path)
    return path


_GET_BUFFER = ctypes.cast(ctypes.pythonapi.PyObject_GetBuffer, ctypes.c_void_p)
_RELEASE_BUFFER = ctypes.cast(ctypes.pythonapi.PyBuffer_Release, ctypes.c_void_p)


def _open(path: Path) -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    """The library's functions, without and with the interpreter's lock held while they run."""
    functions = ctypes.CDLL(str(path))
    functions.qsdpa_attend.argtypes = (ctypes.c_void_p, ctypes.c_double)
    functions.qsdpa_attend.restype = ctypes.c_int
    functions.qsdpa_read.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
    functions.qsdpa_read.restype = ctypes.c_int
    functions.qsdpa_multiply_add.argtypes = (ctypes.c_long, ctypes.c_long)
    functions.qsdpa_multiply_add.restype = ctypes.c_long
    locked_functions = ctypes.PyDLL(str(path))
    locked_functions.qsdpa_views.argtypes = (ctypes.c_void_p, ctypes.c_long, *(ctypes.c_void_p,) * 3)
    locked_functions.qsdpa_views.restype = ctypes.c_long
    return functions, locked_functions


def _sources() -> dict[str, str]:
    folder = importlib.resources.files("qsdpa_patch").joinpath("kernels", "cpu", "src")
    files = sorted((f for f in folder.iterdir() if f.name.endswith((".c", ".h"))), key=lambda f: f.name)
    return {f.name: f.read_text() for f in files}


def _key(sources: dict[str, str], compiler: Compiler) -> str:
    return _digest(repr((sources, compiler.command, compiler.version, compilers.ALL_FLAGS, _cpu())).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@cache
def _cpu() -> str:
    """This machine's CPU as far as code made for it goes: a home folder may be shared by several machines."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
        return f"{platform.machine()} {name}"
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    telling = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted(line for line in first.splitlines() if line.startswith(telling))) + platform.machine()


def _writable_directory() -> Path:
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
