"""Rules of Metal's that the C++ for OpenCL front end does not enforce."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.metal.emulator.source import tokenize

__all__ = ["broken_rules"]

_NOT_IN_METAL = {
    "double", "goto", "new", "delete", "virtual", "dynamic_cast", "typeid", "noexcept", "register", "thread_local",
    "throw", "try",
}  # fmt: skip
_RESERVED = {"vertex", "fragment", "ray_data", "object_data", "threadgroup_imageblock", "coherent"}
"""Keywords of Metal's that are none here: of the stages, ``kernel`` is one in OpenCL too."""
_SYNTAX_ONLY = (
    "-fsyntax-only", "-Wconversion", "-Wno-sign-conversion", "-Wpre-c++17-compat", "-Xclang", "-ast-dump",
    "-fno-color-diagnostics",
)  # fmt: skip


def broken_rules(unit: Path, command: Sequence[str]) -> list[str]:
    """The rules that the translation unit in the file ``unit`` breaks, in words. ``command``: clang and its options."""
    text = unit.read_text()
    _, _, kernel = text.partition('#line 1 "kernel.metal"\n')
    tokens = set(tokenize(kernel))
    words = [f"'{word}' is not in Metal" for word in sorted(_NOT_IN_METAL & tokens)]
    words += [f"'{word}' is a keyword of Metal's" for word in sorted(_RESERVED & tokens)]
    syntax = subprocess.run([*command, *_SYNTAX_ONLY, str(unit)], capture_output=True, text=True, check=False)
    tree = list(_of_the_kernel(syntax.stdout))
    messages = _narrowing_to_bfloat(syntax.stderr) + _newer_than_cpp14(syntax.stderr)
    return words + messages + _missing_address_spaces(tree) + _lambdas(tree)


def _narrowing_to_bfloat(messages: str) -> list[str]:
    """Metal converts float to bfloat only explicitly."""
    found = []
    for line in messages.splitlines():
        if "kernel.metal:" in line and "loses floating-point" in line and re.search(r"to ('bfloat|.*__bf16')", line):
            found.append(line.split("kernel.metal:")[1])
    return found


def _newer_than_cpp14(messages: str) -> list[str]:
    """Before Metal 4 the language is C++14. Its ``if constexpr``, an extension there, MLX's own kernels have too."""
    found = []
    for line in messages.splitlines():
        newer = re.search(r"kernel\.metal:(.*?) (?:is|are) incompatible with C\+\+ standards before C\+\+17", line)
        if newer and "constexpr if" not in newer[1]:
            found.append("newer than C++14: " + newer[1])
    return found


def _of_the_kernel(tree: str) -> Iterator[str]:
    """The lines of a syntax tree that are about the source of the kernel."""
    in_kernel = False
    first = max(0, tree.rfind("\n", 0, tree.find("kernel.metal:")))  # the declarations of headers come before
    for line in tree[first:].splitlines():
        # A location names its file only where that differs from the previous one.
        for match in re.finditer(r"([\w./-]+\.(?:h|metal|clcpp)|<scratch space>|<invalid sloc>)(?=:\d+:\d+|>)", line):
            in_kernel = match[1] == "kernel.metal"
        if in_kernel and " implicit " not in line:
            yield line


def _missing_address_spaces(tree: Sequence[str]) -> list[str]:
    """In Metal every pointer and reference names its address space; OpenCL takes one without for generic."""
    found = []
    for line in tree:
        if not re.search(r"\b(VarDecl|ParmVarDecl|FieldDecl)\b", line):
            continue
        named = re.search(r"(?:line|col):[\d:]+ (?:used |referenced |invalid )*(?!used |referenced )\w+ '", line)
        generic = re.search(r"__generic [^']*[*&]|__generic[^']*\(&", line.split("'", 1)[-1])
        if named and generic:
            found.append("missing address space: " + re.sub(r"^[ |`-]*|0x[0-9a-f]+ |<.*?> ", "", line)[:120])
    return found


def _lambdas(tree: Sequence[str]) -> list[str]:
    """On macOS 14, MLX compiles as Metal 3.1, which has none."""
    return ["a lambda is not in Metal 3.1"] if any(re.search(r"\bLambdaExpr\b", line) for line in tree) else []
