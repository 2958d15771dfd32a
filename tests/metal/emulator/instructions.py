"""Counts the instructions that a kernel executes, by kind, from its compiled code.

A kernel is compiled to optimized LLVM assembly, and a call that counts is put into each basic block: how often each
ran, times the instructions in it, is the count. These are the instructions that clang makes for a scalar machine, not
those of Apple's compiler: good for comparing kernels, and for estimates within some tens of percent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

__all__ = ["KINDS", "instrument", "total"]

KINDS = {
    "shift": r"(?:lshr|ashr|shl)(?: \w+)* i(?:32|16|8) (?!\S+, 16$)",  # but for the upper half of a register
    "bitwise": r"(?:and|or|xor)(?: \w+)* i(?:32|16|8) ",
    "convert": r"(?:uitofp|sitofp|fptoui|fptosi) ",  # between integers and floats
    "multiply": r"mul(?: \w+)* i32 ",  # of integers, as addresses are made of
    "multiply 64": r"mul(?: \w+)* i64 ",
    "float": r"(?:fadd|fsub|fmul|fdiv)(?: \w+)* (?:float|half)|call .*@llvm\.(?:fma|fmuladd|maxnum|minnum)\.f(?:16|32)",
    "add": r"(?:add|sub)(?: \w+)* i32 ",
    "select": r"select(?: \w+)* i1 |call .*@llvm\.[us](?:min|max)\.i32",
    "widen": r"fpext (?:half|bfloat) |call .*@__extendhfsf2",  # 16-bit floats to 32 bits
    "exp": r"call .*@(?:expf|llvm\.exp\.f32)",
}
_CALL = "  call void @emu_count(i32 {block})\n"


def instrument(assembly: str) -> tuple[str, list[dict[str, int]]]:
    """LLVM assembly with every basic block counted, and the instructions of each kind in each block."""
    lines: list[str] = []
    blocks: list[dict[str, int]] = []
    in_function = at_start = False
    for line in assembly.splitlines(keepends=True):
        if line.startswith("define "):
            in_function, at_start = True, True
        elif line.startswith("}"):
            in_function = False
        elif in_function and re.match(r"[\w.$-]+:", line):
            at_start = True
        elif in_function and at_start and line.strip() and not re.match(r"\s+%\S+ = phi ", line):
            lines.append(_CALL.format(block=len(blocks)))
            blocks.append(dict.fromkeys(KINDS, 0))
            at_start = False
        lines.append(line)
        if in_function and blocks:
            scalar, width = _of_elements(line)
            for kind, pattern in KINDS.items():
                blocks[-1][kind] += width * bool(re.search(rf"(?:= |\s){pattern}", scalar))
    return "".join(lines) + "\ndeclare void @emu_count(i32)\n", blocks


def _of_elements(line: str) -> tuple[str, int]:
    """The instruction on each element of a vector instruction, and how many there are."""
    vector = re.search(r"<(\d+) x (\w+)>", line)
    if vector is None:
        return line, 1
    return re.sub(r"<\d+ x (\w+)>", r"\1", line).replace(f".v{vector[1]}f", ".f"), int(vector[1])


def total(blocks: Sequence[Mapping[str, int]], executed: Sequence[int]) -> dict[str, int]:
    """Instructions of each kind, all threads together."""
    counts: Counter[str] = Counter()
    for kinds, times in zip(blocks, executed):
        for kind, number in kinds.items():
            counts[kind] += number * times
    return dict(counts)
