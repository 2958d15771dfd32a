"""The CPU kernel as an operation of MLX's lazy graph: when it runs, on what, and where it cannot be built."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from packaging.version import Version

from qsdpa_patch.caches import QuantizedKVCache
from qsdpa_patch.kernels.attention_call import AttentionCall, check_call
from qsdpa_patch.kernels.backends import Declined
from qsdpa_patch.kernels.cpu import backend, graph, library, plans
from qsdpa_patch.kernels.cpu.compiler import CXX, Compiler, CompilerError, find_compiler
from qsdpa_patch.kernels.cpu.graph import Graph, GraphError
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.pending_rows import PendingRows
from qsdpa_patch.kernels.quantized_tensor import PackedStack
from tests.attention_cases import Case, build, relative_error
from tests.kernels.double_precision import attend_in_double
from tests.threads import run_in_threads

_async_eval: Any = mx.async_eval  # has no type annotations


def _why_not() -> str:
    try:
        find_compiler(CXX)
    except CompilerError as error:
        return str(error)
    return backend.is_available()[1]


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


def loaded() -> Graph:
    return graph.load_graph(library.load_library().path)


@dataclass
class Recorder:
    """Stands in for the kernel, which it calls: the views it got, and the threads that it ran on.

    result: returned in place of calling the kernel.
    """

    result: int | None = None
    views: list[list[tuple[int, ...]]] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_double)(self._run)

    def _run(self, fields: int, scale: float) -> int:
        numbers = plans.CallFields.from_address(fields)
        self.views.append([tuple(numbers[5 * i : 5 * i + 5]) for i in range(plans.VIEW_COUNT)])
        self.threads.append(threading.get_ident())
        if self.result is not None:
            return self.result
        done: int = library.load_library().functions.qsdpa_attend(fields, scale)
        return done

    def attend(self, call: AttentionCall) -> mx.array:
        kernel = ctypes.cast(self._callback, ctypes.c_void_p).value
        assert kernel is not None
        return graph.attend_lazily(loaded().attend, kernel, call, plans.fill_fields(call, threads=2))


def view_of(x: mx.array) -> tuple[int, ...]:
    """Where ``x`` is and its strides, as the kernel gets them."""
    shared: Any = x
    with memoryview(shared) as memory:
        assert memory.shape is not None
        assert memory.strides is not None
        strides = [0 if n == 1 else s for n, s in zip(memory.shape, memory.strides)]
        address = _address(memory)
    return (address, *strides, *(0,) * (4 - len(strides)))


def _address(memory: memoryview) -> int:
    buffer = (ctypes.c_char * 88)()  # no smaller than a Py_buffer, which begins with the address
    get, release = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
    assert get(ctypes.py_object(memory), ctypes.byref(buffer), 0x18) == 0  # PyBUF_STRIDES
    address = ctypes.c_size_t.from_buffer(buffer).value
    release(ctypes.byref(buffer))
    return address


CALL = Case(seed=5, kv_heads=2, group=3, count=300, capacity=333, length=2, dtype=mx.float16, sinks=True, mask="bool")


def test_calls_are_lazy_here() -> None:
    assert backend.has_fused_kernel(build(CALL).signature) == (True, "")
    assert backend.describe()["calls"] == "lazy, in MLX's graph"


def test_the_kernel_runs_when_somebody_asks_for_its_output_and_once() -> None:
    call, recorder = build(CALL), Recorder()
    dropped, out = recorder.attend(call), recorder.attend(call)
    del dropped
    assert (out.shape, out.dtype) == ((1, 6, 2, 64), mx.float16)
    later = out * 2
    mx.synchronize()
    assert recorder.views == []
    _async_eval(later)
    assert relative_error(later / 2, attend_in_double(call)) <= 2e-3
    mx.eval(out)
    assert len(recorder.views) == 1


def test_inputs_need_not_be_evaluated() -> None:
    call, recorder = build(CALL), Recorder()
    wanted = attend_in_double(replace(call, queries=call.queries * 2))
    queries = call.queries + call.queries
    out = recorder.attend(replace(call, queries=queries))
    assert relative_error(out, wanted) <= 2e-3


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("stacked", [False, True])
def test_slices_are_read_in_place(stacked: bool, kv_heads: int) -> None:
    """Keys and values are slices of buffers, which nothing copies: every view is that of the array itself."""
    call, recorder = build(replace(CALL, stacked=stacked, kv_heads=kv_heads)), Recorder()
    assert (call.stack is not None) == stacked
    parts = (*call.keys.parts, *call.values.parts)
    mx.eval(*parts)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = recorder.attend(call)
    mx.eval(out)
    assert mx.get_peak_memory() - before <= 2 * out.nbytes
    (views,) = recorder.views
    assert call.sinks is not None
    assert isinstance(call.mask, mx.array)
    assert views[1] == view_of(out.view(mx.uint16))
    assert views[2:6] == [view_of(call.mask), view_of(call.sinks), (0,) * 5, (0,) * 5]
    assert views[6:] == [view_of(x if x.dtype != mx.float16 else x.view(mx.uint16)) for x in parts]


def test_rows_of_a_cache_that_a_kernel_has_still_to_write() -> None:
    """A cache that grew on a GPU may be attended to on the CPU."""
    wanted = build(replace(CALL, stacked=True))
    stack = wanted.stack
    assert stack is not None
    buffers = [mx.concatenate([x[:, :, :-2], mx.zeros_like(x)], axis=2) for x in (stack.codes, stack.scales)]
    sides = [mx.zeros((1, 2, 2, 64), mx.float16)] * 2
    written: list[int] = []

    def write(_: list[mx.array], places: list[mx.array], stop: int, after: mx.array | None) -> mx.array:
        mx.eval(places)
        for place, x in zip(places, (stack.codes, stack.scales), strict=True):
            np.asarray(place, copy=False)[:, :, stop - 2 : stop] = np.asarray(x[:, :, -2:])
        written.append(stop)
        return mx.zeros((1,))

    pending = PendingRows(sides, write, buffers, stack.rows, None)
    keys, values = PackedStack(
        buffers[0], buffers[1], 2, stack.format, dim=stack.dim, dtype=stack.dtype, rows=stack.rows, pending=pending
    ).members()
    call = check_call(wanted.queries, keys, values, scale=wanted.scale, mask=wanted.mask, sinks=wanted.sinks)
    assert mx.array_equal(backend.attend(call), backend.attend(wanted))
    assert written == [stack.rows]


def test_scattered_rows_are_gathered() -> None:
    call, recorder = build(CALL), Recorder()
    scattered = mx.random.normal((1, 6, 64, 2)).astype(mx.float16).swapaxes(2, 3)
    moved = replace(call, queries=scattered)
    assert relative_error(recorder.attend(moved), attend_in_double(moved)) <= 2e-3
    assert recorder.views[0][0][4] == 2


def test_inputs_may_be_dropped_before_the_kernel_runs() -> None:
    """In a graph of many calls, whose inputs nothing else holds, between arrays that come and go."""
    outs, wanted = [], []
    for seed in range(30):
        call = build(Case(seed=seed, kv_heads=2, group=2, count=90 + seed, capacity=128))
        wanted.append(attend_in_double(call))
        mx.eval(wanted[-1])
        fresh = replace(call, queries=mx.array(call.queries) * 1)
        outs.append(backend.attend(fresh))
        del call, fresh
        mx.eval(mx.random.normal((64, 64)))
        gc.collect()
    _async_eval(outs)
    mx.eval([mx.random.normal((2, 4, 90, 64)) for _ in range(20)])
    assert all(relative_error(out, right) <= 1e-5 for out, right in zip(outs, wanted))


def test_inputs_stay_as_they_are() -> None:
    call = build(CALL)
    kept = [mx.array(x) for x in (call.queries, *call.keys.parts, *call.values.parts)]
    mx.eval(kept)
    mx.eval(backend.attend(call))
    assert all(mx.array_equal(x, y) for x, y in zip(kept, (call.queries, *call.keys.parts, *call.values.parts)))


def test_calls_may_depend_on_each_other() -> None:
    call = build(Case(seed=8, kv_heads=2, group=2, count=200, capacity=256))
    out, wanted = call.queries, call.queries
    for _ in range(20):
        out, wanted = backend.attend(replace(call, queries=out)), attend_in_double(replace(call, queries=wanted))
    assert relative_error(out, wanted) <= 1e-4


def test_a_cache_may_grow_while_steps_are_computed() -> None:
    """Rows are written in place, beside those that calls of the step before may still be reading."""

    def steps(attend: Callable[[AttentionCall], mx.array]) -> list[mx.array]:
        mx.random.seed(1)
        cache = QuantizedKVCache(Format.affine(4, 64), Format.affine(8, 32))
        weights, x, outs = mx.random.normal((3, 128, 128)) * 0.1, mx.random.normal((1, 1, 128)), []
        for _ in range(300):
            queries, keys, values = ((x @ w).reshape(1, 1, 2, 64).swapaxes(1, 2) for w in weights)
            quantized: Any = cache.update_and_fetch(keys, values)
            out = attend(check_call(queries, *quantized, scale=0.125))
            del quantized
            x = mx.tanh(x + out.swapaxes(1, 2).reshape(1, 1, 128)) * 2
            _async_eval(x)
            outs.append(x)
        return outs

    assert mx.array_equal(mx.stack(steps(backend.attend)), mx.stack(steps(backend.attend_evaluated)))


def test_without_keys_the_output_is_zero() -> None:
    call = build(Case(seed=0, count=0, capacity=2))
    assert mx.array_equal(backend.attend(call), mx.zeros(call.queries.shape))


def test_the_kernel_runs_on_the_stream_of_the_call() -> None:
    call, recorder = build(CALL), Recorder()
    mx.eval(recorder.attend(call))
    stream = mx.new_stream(mx.cpu)
    for _ in range(2):
        with mx.stream(stream):
            out = recorder.attend(call)
        mx.eval(out + 1)
    first, second, third = recorder.threads
    assert first != second == third
    assert threading.get_ident() not in recorder.threads


def test_threads_may_use_streams_of_their_own_at_once() -> None:
    failures: list[int] = []
    calls = [build(Case(seed=s, kv_heads=2, group=4, count=1500, capacity=1500)) for s in range(4)]
    wanted = [attend_in_double(call) for call in calls]
    mx.eval(wanted, *(call.queries for call in calls))

    def hammer(k: int) -> None:
        for _ in range(20):
            out = backend.attend(calls[k])
            mx.eval(out)
            if relative_error(out, wanted[k]) > 1e-5:
                failures.append(k)

    run_in_threads(hammer, 4)
    assert failures == []


@pytest.mark.skipif(
    Version(version("mlx")) < Version("0.32.3"), reason="MLX ends the process where an operation fails on its thread"
)
def test_a_kernel_without_memory_is_an_error_of_the_evaluation() -> None:
    call, failing, working = build(CALL), Recorder(result=1), Recorder()
    out = failing.attend(call)
    with pytest.raises(RuntimeError, match="not enough memory for quantized attention"):
        mx.eval(out)
    assert relative_error(working.attend(call), attend_in_double(call)) <= 2e-3


def test_objects_that_are_not_as_new_arrays_are_declined() -> None:
    class Unmade(mx.array):
        pass

    call = build(CALL)
    unmade: Any = mx.array.__new__(Unmade)
    with pytest.raises(Declined, match="as no new array is"):
        backend.attend(replace(call, queries=unmade))


def test_a_process_may_end_while_calls_are_computed() -> None:
    program = (
        "import mlx.core as mx\n"
        "from qsdpa_patch.kernels.cpu import backend\n"
        "from tests.attention_cases import Case, build\n"
        "call = build(Case(seed=1, kv_heads=4, group=4, count=3000, capacity=3000))\n"
        "mx.async_eval([backend.attend(call) for _ in range(20)])\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory; the process's own libraries are elsewhere."""
    loaded()
    monkeypatch.setenv("QSDPA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path) -> Callable[[str], Compiler]:
    """Makes a compiler of a shell script, which has ``$source`` and the output ``$out``; its runs are counted."""

    def make(script: str) -> Compiler:
        path = tmp_path / "compiler"
        names = 'for x in "$@"; do case $x in *.cpp) source=$x;; *.so) out=$x;; esac; done'
        path.write_text(f"#!/bin/sh\necho run >> {tmp_path}/runs\n{names}\n{script}\n")
        path.chmod(0o755)
        return Compiler((str(path),), "a script", CXX)

    return make


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def built(compiler: Compiler) -> Graph:
    return graph.find_or_build(compiler, library.load_library().path)


def test_the_library_is_tried_out_once_and_kept(
    cache: Path, compiler: Callable[[str], Compiler], tmp_path: Path
) -> None:
    copying = compiler(f'cp "{loaded().path}" "$out"')
    first, second = built(copying), built(copying)
    assert first.path == second.path
    assert (first.compile_seconds > 0, second.compile_seconds) == (True, 0)
    assert runs(tmp_path) == 1
    assert [p.name for p in cache.iterdir()] == [first.path.name]


def test_a_library_that_reads_arrays_elsewhere_is_refused_for_good(
    cache: Path, compiler: Callable[[str], Compiler], tmp_path: Path
) -> None:
    """As if nanobind kept arrays otherwise: whatever that does, it does it to another process."""
    edit = "s/reinterpret_cast<char \\*>(object) + it->distance/reinterpret_cast<char *>(object) + 8/"
    wrong = compiler(f'sed -i.orig \'{edit}\' "$source"\nexec {find_compiler(CXX).command[0]} "$@"')
    for _ in range(2):
        with pytest.raises(GraphError, match=r"its trial run (ended by signal|failed)"):
            built(wrong)
    assert runs(tmp_path) == 1
    assert [p.suffix for p in cache.iterdir()] == [".refused"]


def test_a_library_with_wrong_results_is_refused(cache: Path, compiler: Callable[[str], Compiler]) -> None:
    edit = "s/scale = scale_, attend/scale = scale_ * 1.1, attend/"
    wrong = compiler(f'sed -i.orig \'{edit}\' "$source"\nexec {find_compiler(CXX).command[0]} "$@"')
    with pytest.raises(GraphError, match="its trial run failed: its results differ from the reference"):
        built(wrong)


def test_a_failing_compiler_is_quoted(cache: Path, compiler: Callable[[str], Compiler]) -> None:
    with pytest.raises(CompilerError, match=r"compiler failed: graph\.cpp:3: error: no C\+\+20"):
        built(compiler('echo "graph.cpp:3: error: no C++20" >&2\nexit 1'))
    assert list(cache.iterdir()) == []


def test_headers_that_are_missing_are_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: Callable[[str], Compiler], tmp_path: Path
) -> None:
    monkeypatch.setattr(graph, "_core_library", lambda: tmp_path / "core.so")
    with pytest.raises(GraphError, match="include has no headers of MLX"):
        built(compiler("exit 1"))


def test_another_mlx_is_left_alone(monkeypatch: pytest.MonkeyPatch, compiler: Callable[[str], Compiler]) -> None:
    monkeypatch.setattr(graph._core, "__version__", "0.33.1")
    with pytest.raises(GraphError, match=r"mlx 0\.33\.1"):
        built(compiler("exit 1"))


def test_an_interpreter_that_is_none_is_not_started(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: Callable[[str], Compiler]
) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/some-application")
    with pytest.raises(GraphError, match=r"sys\.executable is '/opt/some-application'"):
        built(compiler(f'cp "{loaded().path}" "$out"'))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("how", ["missing", "failing"])
def test_without_a_library_inputs_are_evaluated(how: str, tmp_path: Path, compiler: Callable[[str], Compiler]) -> None:
    """In a process of its own: what there is, is settled once in a process."""
    command = "no-such-compiler" if how == "missing" else compiler("exit 3").command[0]
    program = (
        "from qsdpa_patch.kernels.cpu import backend\n"
        "from tests.attention_cases import Case, build, expected, relative_error\n"
        "call = build(Case(seed=1))\n"
        "print(backend.has_fused_kernel(call.signature), relative_error(backend.attend(call), expected(call)) < 1e-4)\n"
        "print(backend.describe()['calls'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, env={**os.environ, "CXX": command}, check=True,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first == "(True, '') True"
    assert second.startswith("on evaluated inputs: ")
    assert ("CXX='no-such-compiler'" if how == "missing" else "exit status 3") in second
    assert done.stderr == ""
