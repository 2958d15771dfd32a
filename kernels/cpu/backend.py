"""The CPU backend: one C library, compiled for the host at first use, which reads its inputs in place.

Calls are operations of MLX's lazy graph (``graph.py``), where a C++ compiler and MLX's headers are. Where they are not,
each call evaluates its inputs, waits for them, and returns an evaluated array.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall, Signature
from qsdpa_patch.kernels.backends import Declined
from qsdpa_patch.kernels.cpu import plans
from qsdpa_patch.kernels.cpu.compiler import CompilerError, find_compiler
from qsdpa_patch.kernels.cpu.graph import Graph, GraphError, attend_lazily, load_graph
from qsdpa_patch.kernels.cpu.library import load_library, loaded_library
from qsdpa_patch.kernels.cpu.library_cache import cache_directory
from qsdpa_patch.kernels.cpu.self_check import wrong_results

__all__ = ["attend", "attend_evaluated", "describe", "has_fused_kernel", "is_available", "thread_count"]

_log = logging.getLogger(__name__)
_FAILURES = {1: "not enough memory for the CPU kernel", 2: "the numbers of an input's rows are not contiguous"}


_async_eval: Any = mx.async_eval  # has no type annotations


@cache
def is_available() -> tuple[bool, str]:
    """Whether this machine can run the kernels, and if not, why. Compiles nothing."""
    if os.name != "posix":
        return False, f"the CPU kernels need POSIX threads; this is {os.name}"
    try:
        find_compiler()
    except CompilerError as error:
        return False, str(error)
    return True, ""


@cache
def has_fused_kernel(signature: Signature) -> tuple[bool, str]:
    """Whether calls of ``signature`` can be taken, and if not, why. The first use compiles the library."""
    available, reason = is_available()
    if not available:
        return False, reason
    for name, dim in (("key", signature.key_dim), ("value", signature.value_dim)):
        if dim % 32 or not 32 <= dim <= 512:
            return False, f"{name} rows of {dim} numbers: the kernel takes multiples of 32 from 32 to 512"
    failure = _library_failure()
    return not failure, failure


@cache
def _library_failure() -> str:
    """Why the library cannot be used, logged once; empty when it is compiled, loaded and right."""
    try:
        library = load_library()
    except CompilerError as error:
        failure = str(error)
    else:
        wrong = wrong_results(attend_evaluated)
        failure = f"the CPU kernels made by {library.compiler} are not used: {wrong}" if wrong else ""
        if not failure:
            _graph_failure()  # now, rather than in the middle of a text
    if failure:
        _log.warning("no CPU kernels: %s", failure)
    return failure


@cache
def _graph() -> Graph | None:
    """The kernel as an operation of the lazy graph, or ``None``: see :func:`_graph_failure`."""
    return None if _graph_failure() else load_graph(load_library().path)


@cache
def _graph_failure() -> str:
    """Why the kernel cannot be an operation of the lazy graph; empty when it can, and its results are right."""
    try:
        graph = load_graph(load_library().path)
        failure = wrong_results(lambda call: _attend_in_graph(graph, call))
    except (GraphError, Declined, RuntimeError) as error:
        failure = str(error)
    if failure:
        _log.info("the CPU kernel evaluates its inputs at each call: %s", failure)
    return failure


def describe() -> dict[str, str]:
    """What a user may want to know when something is amiss: compiler, cached library, threads. Compiles nothing."""
    library = loaded_library()
    facts = {"cache": str(cache_directory()), "threads": str(thread_count())}
    try:
        facts["compiler"] = str(find_compiler())
    except CompilerError as error:
        facts["compiler"] = str(error)
    if library is not None:
        facts["library"] = str(library.path)
        facts["compile time"] = f"{library.compile_seconds:.1f} s" if library.compile_seconds else "none: it was cached"
    if _graph_failure.cache_info().currsize:
        facts["calls"] = "lazy, in MLX's graph" if _graph() else f"on evaluated inputs: {_graph_failure()}"
    if _library_failure.cache_info().currsize and _library_failure():
        facts["failure"] = _library_failure()
    return facts


@cache
def thread_count() -> int:
    """Threads of a call: ``$QSDPA_CPU_THREADS``, or the cores that this process may use."""
    chosen = os.environ.get("QSDPA_CPU_THREADS", "")
    if chosen:
        if not chosen.isdigit() or int(chosen) < 1:
            raise ValueError(f"QSDPA_CPU_THREADS={chosen!r}: give a number of threads, 1 or more")
        return int(chosen)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def attend(call: AttentionCall) -> mx.array:
    """Attention ``[B, Hq, L, Dv]`` of ``call`` in the queries' dtype: lazy, or evaluated where the graph has no kernel.

    Without enough memory for the kernel's own, evaluating a lazy output raises ``RuntimeError``.

    Raises:
        Declined: the inputs are traced (``mx.compile``, ``mx.vmap``, ``mx.grad``). Where inputs are evaluated also if
            rows are not contiguous, or there is not enough memory.
    """
    graph = _graph()
    return attend_evaluated(call) if graph is None else _attend_in_graph(graph, call)


def _attend_in_graph(graph: Graph, call: AttentionCall) -> mx.array:
    return attend_lazily(graph.attend, load_library().attend_address, call, _fields(call))


def attend_evaluated(call: AttentionCall) -> mx.array:
    """Likewise, now: the inputs are evaluated, the kernel has run."""
    sig, library = call.signature, load_library()
    arrays = plans.arrays_of(call)
    _start_evaluating([a for a in arrays if a is not None])
    arrays[1], result = _output((sig.batch, sig.query_heads, sig.query_length, sig.value_dim), sig.dtype)
    fields = _fields(call)
    library.read_views(arrays, fields)
    if failure := library.functions.qsdpa_attend(fields, call.scale):
        raise Declined(_FAILURES[failure])
    # What is traced for gradients but evaluated already is not refused: a fresh slice of it is. Now rather than before,
    # so that MLX's thread does not take a core from the kernel.
    _start_evaluating([call.queries[..., :1]])
    return result


def _fields(call: AttentionCall) -> ctypes.Array[ctypes.c_int64]:
    try:
        return plans.fill_fields(call, thread_count())
    except KeyError as error:
        raise Declined(f"the CPU kernel does not take {error.args[0]}") from None


def _start_evaluating(arrays: list[mx.array]) -> None:
    """Start evaluating what the kernel reads, or decline: it cannot run on traced arrays, nor be differentiated.

    Unlike ``eval``, ``async_eval`` refuses arrays that are traced for gradients.
    """
    try:
        _async_eval(arrays)
    except ValueError as error:
        if "transformation" not in str(error):
            raise
        raise Declined("the CPU kernel takes evaluated arrays: not under mx.compile, mx.vmap or mx.grad") from error


_DLPACK_CPU = 1
_LARGEST_TEMPLATE = 1 << 20
"""Bytes of an output whose zeros are kept to be copied."""


def _output(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """A new array for the kernel to write into, and the array of ``dtype`` that it is.

    Evaluated already: an op, be it ``zeros`` or ``view``, would cost a trip to the stream's thread.
    """
    size = math.prod(shape) * dtype.size
    template: Any = _template(shape, dtype) if size <= _LARGEST_TEMPLATE else None
    if template is not None:
        out = mx.array(template)
        return out, out
    zeros: Any = memoryview(bytes(size))
    if dtype == mx.float32:
        out = mx.array(zeros.cast("f", shape))
        return out, out
    out = mx.array(zeros.cast("H", shape))
    return out, out.view(dtype)


class _Template:
    """Zeros that ``mx.array`` copies at once, at every dtype: it does so with what has ``__dlpack__`` and is none of
    its own arrays."""

    def __init__(self, zeros: mx.array) -> None:
        self._export: Any = zeros.__dlpack__

    def __dlpack__(self, **options: Any) -> Any:
        return self._export(**options)


@lru_cache(maxsize=16)
def _template(shape: tuple[int, ...], dtype: mx.Dtype) -> _Template | None:
    """``None`` where MLX has its arrays in memory that it does not copy from: on builds for a GPU."""
    zeros: Any = mx.zeros(shape, dtype, stream=mx.cpu)
    mx.eval(zeros)
    return _Template(zeros) if zeros.__dlpack_device__()[0] == _DLPACK_CPU else None
