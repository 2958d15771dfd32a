"""Compiles rewritten kernels into shared libraries, cached by what went into them."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import mlx.core as mx

from tests.metal.emulator.errors import MetalError
from tests.metal.emulator.instructions import instrument
from tests.metal.emulator.rules import broken_rules
from tests.metal.emulator.source import rewrite

__all__ = [
    "CLANG", "arrays_in_memory", "build", "build_counting", "cache_folder", "missing_tools", "runtime_library",
]  # fmt: skip

HERE = Path(__file__).parent
CLANG = os.environ.get("QSDPA_TEST_CLANG", "clang-19")
LANGUAGE = shlex.split(
    "-x cl -cl-std=clc++2021 -cl-no-stdinc -cl-single-precision-constant -target x86_64-linux-gnu -march=x86-64-v3 "
    "-Xclang -cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space -fPIC -ffp-contract=off "
    "-Xclang -fbfloat16-excess-precision=none -Wno-unknown-attributes -Wno-ignored-attributes -Wno-pass-failed"
)
# Every access must stay one load or store of 1 to 16 bytes that is reported: no vectorization, no memcpy idioms.
TRACED = shlex.split(
    "-O1 -fno-vectorize -fno-slp-vectorize -fno-builtin-memcpy -fno-builtin-memset -fno-unroll-loops "
    "-fsanitize-coverage=func,trace-loads,trace-stores -fsanitize-minimal-runtime "
    "-fsanitize=shift,bounds,integer-divide-by-zero,alignment,unreachable,return"
)
# A product and a sum in one expression are one instruction, as Metal makes them.
COUNTED = shlex.split("-O2 -fno-vectorize -fno-slp-vectorize -ffp-contract=on")

_ATTRIBUTES = {  # thread attributes of Metal: (type, value in terms of `const device emu_ids* I`)
    "dispatch_simdgroups_per_threadgroup": "(I->dispatch_threads_per_threadgroup[0] * "
    "I->dispatch_threads_per_threadgroup[1] * I->dispatch_threads_per_threadgroup[2] + 31) / 32",
    "dispatch_threads_per_threadgroup": "EMU_3(dispatch_threads_per_threadgroup)",
    "grid_origin": "uint3(0)",
    "grid_size": "EMU_3(threads_per_grid)",
    "quadgroup_index_in_threadgroup": "I->index_in_threadgroup / 4",
    "simdgroup_index_in_threadgroup": "I->simdgroup",
    "simdgroups_per_threadgroup": "I->simdgroups",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "I->index_in_threadgroup % 4",
    "thread_index_in_simdgroup": "I->lane",
    "thread_index_in_threadgroup": "I->index_in_threadgroup",
    "thread_position_in_grid": "EMU_3(position_in_grid)",
    "thread_position_in_threadgroup": "EMU_3(position_in_threadgroup)",
    "threadgroup_position_in_grid": "EMU_3(threadgroup_position)",
    "threadgroups_per_grid": "EMU_3(threadgroups_per_grid)",
    "threads_per_grid": "EMU_3(threads_per_grid)",
    "threads_per_simdgroup": "32u",
    "threads_per_threadgroup": "EMU_3(threads_per_threadgroup)",
}


def missing_tools() -> str:
    """What this machine lacks to run the emulator, or an empty string."""
    if os.uname().machine != "x86_64" or os.uname().sysname != "Linux":
        return "the Metal emulator runs on Linux, x86-64"
    if shutil.which(CLANG) is None:
        return f"the Metal emulator needs {CLANG} (run .ci/install-clang, or set QSDPA_TEST_CLANG)"
    return ""


@cache
def cache_folder() -> Path:
    """Where compiled kernels are kept, from one run to the next."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qsdpa-metal-emulator"
    folder = Path(os.environ.get("QSDPA_TEST_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def runtime_library() -> Path:
    """runtime.cpp, compiled."""
    source = HERE / "runtime.cpp"
    command = [CLANG, "--driver-mode=g++", "-O2", "-std=c++17", "-fPIC", "-shared", str(source)]
    return _cached(command, source.read_text(), "runtime")


@cache
def mlx_headers() -> Path:
    """MLX's own Metal headers, from the installed wheel, with a few edits that clang's dialect needs."""
    wheel = Path(mx.__file__).parent / "include"
    original = wheel / "mlx/backend/metal/kernels"
    edited = {name: (original / name).read_text() for name in ("complex.h", "fp4.h", "fp8.h")}
    # A constructor that is tied to one address space cannot make the constants of Limits<complex_t>.
    edited["complex.h"] = edited["complex.h"].replace(
        "constexpr complex_t(T real, T imag) thread :", "constexpr complex_t(T real, T imag) :"
    )
    for name in ("fp4.h", "fp8.h"):  # likewise; and a half becomes a bfloat by way of a float
        edited[name] = edited[name].replace(") thread {", ") {")
        edited[name] = edited[name].replace("<bfloat16_t>(this->", "<bfloat16_t>((float)this->")
    edited["bf16_math.h"] = "#pragma once\n"  # the overloads for bfloat are in metal.h
    digest = hashlib.sha256(repr(sorted(edited.items())).encode()).hexdigest()[:16]
    root = cache_folder() / f"mlx-headers-{digest}"
    if not root.exists():
        staging = Path(tempfile.mkdtemp(dir=cache_folder()))
        target = staging / "mlx/backend/metal/kernels"
        shutil.copytree(original, target)
        for name, text in edited.items():
            (target / name).write_text(text)
        try:
            staging.rename(root)
        except OSError:  # another process was first
            shutil.rmtree(staging)
    return root


def build(
    source: str,
    function: str,
    template: Sequence[tuple[str, str]] = (),
    *,
    function_constants: Mapping[str, int | bool] | None = None,
    with_mlx_utilities: bool = True,
) -> Path:
    """Compile the kernel ``function`` of a Metal ``source`` and return the library, with one entry ``emu_entry``.

    Args:
        source: what MLX would hand to Metal's compiler, without MLX's utilities.
        function: name of the kernel function.
        template: its template arguments, (name, value as written in C++).
        function_constants: values of Metal function constants.

    Raises:
        MetalError: with the compiler's messages, or the rules of Metal that the source breaks.
    """
    unit = _translation_unit(source, function, template, function_constants, with_mlx_utilities)
    include = [f"-I{HERE / 'include'}", f"-I{mlx_headers()}"]
    command = [CLANG, *LANGUAGE, *TRACED, *include]
    headers = "".join((HERE / "include" / name).read_text() for name in ("metal.h", "simdgroup.h"))
    digest = hashlib.sha256("\0".join([unit, headers, *command]).encode()).hexdigest()[:24]
    library = cache_folder() / f"kernel-{digest}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        text, obj, shared = (Path(folder) / name for name in ("unit.clcpp", "unit.o", "unit.so"))
        text.write_text(unit)
        with ThreadPoolExecutor(1) as another:
            rules = another.submit(broken_rules, text, [CLANG, *LANGUAGE, *include])
            _run([*command, "-c", str(text), "-o", str(obj)])
            broken = rules.result()
        if broken:
            raise MetalError("rules of Metal broken: " + " | ".join(broken))
        _run([CLANG, "-shared", "-o", str(shared), str(obj), "-lm"])
        shared.replace(library)
    return library


def build_counting(
    source: str,
    function: str,
    template: Sequence[tuple[str, str]] = (),
    *,
    function_constants: Mapping[str, int | bool] | None = None,
) -> tuple[Path, list[dict[str, int]]]:
    """As :func:`build`, but without checks: optimized, and with every basic block counted.

    Returns the library and the instructions by kind in each block.
    """
    unit = _translation_unit(source, function, template, function_constants, with_mlx_utilities=True)
    command = [CLANG, *LANGUAGE, *COUNTED, f"-I{HERE / 'include'}", f"-I{mlx_headers()}"]
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        text, assembly = Path(folder) / "unit.clcpp", Path(folder) / "unit.ll"
        text.write_text(unit)
        _run([*command, "-S", "-emit-llvm", str(text), "-o", str(assembly)])
        counting, blocks = instrument(assembly.read_text())
        assembly.write_text(counting)
        digest = hashlib.sha256(counting.encode()).hexdigest()[:24]
        library = cache_folder() / f"counting-{digest}.so"
        if not library.exists():
            shared = Path(folder) / "unit.so"
            _run([CLANG, "-O1", "-march=x86-64-v3", "-fPIC", "-shared", str(assembly), "-o", str(shared), "-lm"])
            shared.replace(library)
    return library, blocks


def arrays_in_memory(source: str, function: str, template: Sequence[tuple[str, str]] = ()) -> list[str]:
    """The types of the arrays of a thread that are not in registers, with all inlined and unrolled as Metal does it.

    They are those with an index that is known only at run time. On a GPU each use of one is an access to memory.
    """
    unit = _translation_unit(source, function, template, None, with_mlx_utilities=True)
    options = ["-mllvm", "-inline-threshold=1000000000", f"-I{HERE / 'include'}", f"-I{mlx_headers()}"]
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        text, assembly = Path(folder) / "unit.clcpp", Path(folder) / "unit.ll"
        text.write_text(unit)
        _run([CLANG, *LANGUAGE, *COUNTED, *options, "-S", "-emit-llvm", str(text), "-o", str(assembly)])
        found = set(re.findall(r"= alloca (\[[^,\n]*)", assembly.read_text()))
    return sorted(found - {"[6 x float]"})  # the operands of a matrix product, in simdgroup.h


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise MetalError("compile failed:\n" + result.stderr)


def _cached(command: list[str], source: str, name: str) -> Path:
    digest = hashlib.sha256("\0".join([source, *command]).encode()).hexdigest()[:24]
    library = cache_folder() / f"{name}-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            built = Path(folder) / "built.so"
            _run([*command, "-o", str(built)])
            built.replace(library)
    return library


def _translation_unit(
    source: str,
    function: str,
    template: Sequence[tuple[str, str]],
    function_constants: Mapping[str, int | bool] | None,
    with_mlx_utilities: bool,
) -> str:
    """``source``, rewritten, and an entry that calls the kernel with buffers and thread attributes."""
    arguments = [_argument(p, dict(template)) for p in _parameters(source, function)]
    instance = function + ("<" + ", ".join(value for _, value in template) + ">" if template else "")
    utilities = '#include "mlx/backend/metal/kernels/utils.h"\n' if with_mlx_utilities else ""
    return (
        f'#include "metal.h"\n{utilities}#line 1 "kernel.metal"\n{rewrite(source, function_constants)}\n'
        "#define EMU_3(f) uint3(I->f[0], I->f[1], I->f[2])\n"
        'extern "C" void emu_entry(const device ulong* A, const device emu_ids* I) {\n'
        f"  {instance}({', '.join(arguments)});\n}}\n"
    )


def _parameters(source: str, function: str) -> list[str]:
    """The text of each parameter of the kernel ``function``."""
    match = re.search(rf"(?:\[\[kernel\]\]|\bkernel)\s*void\s+{re.escape(function)}\s*\(", source)
    if match is None:
        raise MetalError(f"no kernel {function} in the source")
    parameters, depth, text = [], 1, ""
    for character in source[match.end() :]:
        depth += (character in "(<[") - (character in ")>]")
        if depth == 0:
            break
        if character == "," and depth == 1:
            parameters.append(text)
            text = ""
        else:
            text += character
    return [*parameters, text]


def _argument(parameter: str, template: Mapping[str, str]) -> str:
    """What the entry passes for a parameter: a buffer by its index, or a thread attribute."""
    declaration, _, attribute = " ".join(parameter.split()).partition("[[")
    match = re.fullmatch(r"(.*?)(\w+)", declaration.strip())
    if match is None:
        raise MetalError(f"parameter without a name: {parameter}")
    type_name = re.sub(r"\b\w+\b", lambda m: template.get(m[0], m[0]), match[1]).strip()
    buffer = re.match(r"buffer\((\d+)\)", attribute)
    if buffer is None:
        name = re.match(r"\s*(\w+)", attribute)
        if name is None or name[1] not in _ATTRIBUTES:
            raise MetalError(f"parameter with an unknown attribute: {parameter}")
        value = _ATTRIBUTES[name[1]]
        components = {"uint": ".x", "uint2": ".xy"}.get(type_name, "")
        return value + components if "uint3" in value or "EMU_3" in value else value
    if type_name.endswith("&"):
        return f"*({type_name[:-1]}*)A[{buffer[1]}]"
    return f"({type_name})A[{buffer[1]}]"
