"""The C kernels as a shared library: compiled for this host once, cached on disk, loaded once in a process."""

from __future__ import annotations

import ctypes
import importlib.resources
import platform
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import mlx.core as mx

from qsdpa_patch.kernels.cpu import compiler as compilers
from qsdpa_patch.kernels.cpu import library_cache
from qsdpa_patch.kernels.cpu.compiler import Compiler, CompilerError
from qsdpa_patch.kernels.cpu.library_cache import digest

__all__ = ["CompilerError", "Library", "host_cpu", "load_library", "loaded_library"]

_MAIN = "kernels.c"


@dataclass(frozen=True)
class Library:
    """The loaded library and how it came about. ``compile_seconds`` is 0 where the cache had it."""

    functions: ctypes.CDLL
    locked_functions: ctypes.PyDLL
    path: Path
    compiler: Compiler
    compile_seconds: float

    @cached_property
    def attend_address(self) -> int:
        """Of the C function ``qsdpa_attend``."""
        return ctypes.cast(self.functions.qsdpa_attend, ctypes.c_void_p).value or 0

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


def find_or_build(compiler: Compiler) -> Library:
    sources = _sources()

    def build(folder: Path) -> Path:
        for name, text in sources.items():
            Path(folder, name).write_text(text)
        compiler.compile(folder / _MAIN, folder / "kernels.so")
        return folder / "kernels.so"

    functions, path, seconds = library_cache.find_or_build(_key(sources, compiler), build, _open)
    return Library(*functions, path, compiler, seconds)


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
    return digest(repr((sources, compiler, host_cpu())).encode())


@cache
def host_cpu() -> str:
    """This machine's CPU as far as code made for it goes: a home folder may be shared by several machines."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]  # a folder that not every path has
        name = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
        return f"{platform.machine()} {name}"
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    telling = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted(line for line in first.splitlines() if line.startswith(telling))) + platform.machine()
