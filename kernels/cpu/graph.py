"""The kernel as an operation of MLX's lazy graph, through a small C++ library (``src/graph.cpp``).

It is compiled against the headers of the installed MLX, at first use, and links to the very ``libmlx`` that Python has
loaded. It relies on two things that nobody promises to keep: what MLX asks of a primitive, and where nanobind has an
array within a Python object. So it is for known versions of MLX only, and what was just built first runs in a process
of its own (``graph_probe.py``), and is kept only if its results are right there. Where it cannot be had, the kernel
runs on evaluated inputs.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.backends import Declined
from qsdpa_patch.kernels.cpu import compiler as compilers
from qsdpa_patch.kernels.cpu import library_cache, plans
from qsdpa_patch.kernels.cpu.compiler import CXX, Compiler, CompilerError, run_within
from qsdpa_patch.kernels.cpu.library_cache import digest

__all__ = ["Graph", "GraphError", "attend_lazily", "load_graph", "open_graph"]

_core: Any = mx  # whose type stub leaves out what every module has, and its version
_SOURCE = "graph.cpp"
_MLX_VERSIONS = ("0.32.",)
"""Beginnings of those whose primitives are evaluated as ``src/graph.cpp`` takes it."""
_VERSION_SYMBOL = "_ZN3mlx4core7versionEv"  # mlx::core::version()
_PROBE_TIME_LIMIT = 60.0
_REFUSALS = {
    1: "the CPU kernel does not run under mx.compile, mx.vmap or mx.grad",
    2: "an input is kept in memory as no new array is",
}
_HEADER_BYTES = 16
"""Of a Python object, in all builds of CPython but the free-threaded ones."""


class GraphError(Exception):
    """The kernel cannot be an operation of the graph; the argument is a short message for the user."""


@dataclass(frozen=True)
class Graph:
    """The loaded library. ``compile_seconds`` is 0 where the cache had it.

    attend(kernel, fields, scale, value_dim, stacked, *arrays): makes the second of ``arrays``, a new array of any shape
        and dtype, the lazy output of the C function at the address ``kernel``, over the structure ``fields``
        (``bytes``). ``stacked``: the heads of the keys, where codes and scales of keys are those of a stack of keys and
        values, and the other parts are ``None``; else 0. Returns 0, 1 if an array is traced, or 2 if an array is not
        kept as new ones are; then nothing was done.
    """

    attend: Callable[..., int]
    path: Path
    compiler: Compiler
    compile_seconds: float


_lock = threading.Lock()
_outcome: Graph | GraphError | None = None


def attend_lazily(
    attend: Callable[..., int], kernel: int, call: AttentionCall, fields: ctypes.Array[ctypes.c_int64]
) -> mx.array:
    """The lazy output of ``call``: nothing is evaluated, and nothing computed until somebody asks for it.

    Args:
        attend: of a :class:`Graph`.
        kernel: the address of the C function.
        call: the call.
        fields: of the call, without views.

    Raises:
        Declined: an input is traced (``mx.compile``, ``mx.vmap``, ``mx.grad``).
    """
    stack, sig = call.stack, call.signature
    arrays = plans.arrays_of(call) if stack is None else plans.arrays_of_stack(call, stack)
    arrays[1] = out = mx.array(0)
    stacked = 0 if stack is None else sig.kv_heads
    if refusal := attend(kernel, bytes(fields), call.scale, sig.value_dim, stacked, *arrays):
        raise Declined(_REFUSALS[refusal])
    return out


def load_graph(kernels: Path) -> Graph:
    """The library, compiled and tried out at the first call on this host.

    Args:
        kernels: the compiled C library, to try it out with.

    Raises:
        GraphError: why there is none; the same one for the rest of the process.
    """
    global _outcome
    with _lock:
        if _outcome is None:
            try:
                _outcome = find_or_build(compilers.find_compiler(CXX), kernels)
            except (GraphError, CompilerError, OSError) as error:
                _outcome = error if isinstance(error, GraphError) else GraphError(str(error))
    if isinstance(_outcome, GraphError):
        raise _outcome
    return _outcome


def find_or_build(compiler: Compiler, kernels: Path) -> Graph:
    """What :func:`load_graph` returns, of that compiler.

    A library that fails when tried out is not built again: a file in the cache keeps the reason.
    """
    if object.__basicsize__ != _HEADER_BYTES:
        raise GraphError(f"Python objects have a header of {object.__basicsize__} bytes: {_HEADER_BYTES} are taken")
    if not _core.__version__.startswith(_MLX_VERSIONS):
        raise GraphError(f"primitives of mlx {_core.__version__} are not known: those of mlx 0.32 are")
    core = _core_library()
    headers, libraries = core.parent / "include", core.parent / "lib"
    if not (headers / "mlx" / "version.h").is_file():
        raise GraphError(f"{headers} has no headers of MLX")
    source = importlib.resources.files("qsdpa_patch").joinpath("kernels", "cpu", "src", _SOURCE).read_text()
    arguments = ["-I", str(headers), "-L", str(libraries), f"-Wl,-rpath,{libraries}", "-lmlx"]
    if sys.platform == "darwin":
        arguments += ["-undefined", "dynamic_lookup"]  # what the interpreter has
    key = digest(repr((source, compiler, arguments, _builds(core, libraries), platform.machine())).encode())
    refusal = library_cache.writable_directory() / f"{key}.refused"
    if refusal.is_file():
        raise GraphError(refusal.read_text())

    def build(folder: Path) -> Path:
        Path(folder, _SOURCE).write_text(source)
        built = folder / "graph.so"
        compiler.compile(folder / _SOURCE, built, arguments=arguments)
        if failure := _try_out(built, kernels):
            Path(folder, "refused").write_text(failure)
            os.replace(folder / "refused", refusal)
            raise GraphError(failure)
        return built

    attend, path, seconds = library_cache.find_or_build(key, build, open_graph)
    return Graph(attend, path, compiler, seconds)


def open_graph(path: Path) -> Callable[..., int]:
    """``attend`` of the library at ``path`` (see :class:`Graph`).

    Raises:
        OSError: it cannot be loaded.
        GraphError: it would use another copy of MLX than Python does.
    """
    library = ctypes.PyDLL(str(path))
    library.qsdpa_graph_mlx.restype = ctypes.c_void_p
    version = getattr(ctypes.PyDLL(str(_core_library())), _VERSION_SYMBOL, None)
    if version is None or library.qsdpa_graph_mlx() != ctypes.cast(version, ctypes.c_void_p).value:
        raise GraphError(f"{path} is linked to another copy of MLX than Python's")
    library.qsdpa_graph_attend.restype = ctypes.py_object
    attend: Callable[..., int] = library.qsdpa_graph_attend()
    return attend


def _core_library() -> Path:
    """The extension module ``mlx.core``; MLX's headers and ``libmlx`` are in folders beside it."""
    return Path(_core.__file__)


def _builds(core: Path, libraries: Path) -> tuple[object, ...]:
    """What tells this build of MLX and Python from others: wheels for different devices have the same version."""
    files = [core, *sorted(libraries.glob("libmlx.*"))]
    return (_core.__version__, sys.implementation.cache_tag, *((file.name, file.stat().st_size) for file in files))


def _try_out(built: Path, kernels: Path) -> str:
    """Why ``built`` is not to be used; empty when its results are right, in a process of its own, which may crash.

    Raises:
        GraphError: it could not be tried out, which says nothing about it.
    """
    if not Path(sys.executable or "").name.lower().startswith("python"):
        raise GraphError(f"there is no Python interpreter to try it out in: sys.executable is {sys.executable!r}")
    command = [sys.executable, "-P", "-m", "qsdpa_patch.kernels.cpu.graph_probe", str(built), str(kernels)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "QSDPA_PATCH": ""}
    status, output = run_within(_PROBE_TIME_LIMIT, command, environment)
    if status is None:
        raise GraphError(f"its trial run did not end within {_PROBE_TIME_LIMIT:g} s")
    if status < 0:
        return f"its trial run ended by signal {-status}"
    return f"its trial run failed: {(output.strip().splitlines() or [''])[-1]}" if status else ""
