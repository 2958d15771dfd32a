"""Rewriting of Metal sources into C++ for OpenCL, token by token.

Four things of Metal's are not in that language, though all of them can be said in it:

- ``threadgroup T x[n];`` inside a kernel becomes a reference into the run time's arena;
- ``vec<T, N>(...)`` becomes a call of ``emu_make``;
- a floating literal without suffix is a ``float``: Metal has no ``double``;
- ``constant T x [[function_constant(i)]];`` becomes a ``constexpr`` with the value given for ``x``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["rewrite", "tokenize"]

_TOKEN = re.compile(
    r"""
    (?P<space>\s+ | //[^\n]* | /\*.*?\*/)
  | (?P<string>"(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*')
  | (?P<number>(?:\d[\w.']*(?:(?<=[eEpP])[+-]\w*)?) | \.\d[\w]*(?:(?<=[eE])[+-]\w*)?)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<punctuation>\[\[|\]\]|::|.)
    """,
    re.X | re.S,
)
_UNSUFFIXED_FLOAT = re.compile(r"(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+")


def tokenize(source: str) -> list[str]:
    """The tokens of ``source``; white space and comments are tokens too, so that they join to ``source``."""
    return [match[0] for match in _TOKEN.finditer(source)]


def rewrite(source: str, function_constants: Mapping[str, int | bool] | None = None) -> str:
    """``source`` in C++ for OpenCL, with the same line numbers."""
    tokens = [_as_float(t) for t in tokenize(source)]
    tokens = _threadgroup_variables(tokens)
    tokens = _vector_constructors(tokens)
    return _function_constants("".join(tokens), function_constants or {})


def _as_float(token: str) -> str:
    return token + "f" if _UNSUFFIXED_FLOAT.fullmatch(token) else token


def _is_blank(token: str) -> bool:
    return token.isspace() or token.startswith(("//", "/*"))


def _next(tokens: list[str], i: int) -> int:
    """The index of the first token from ``i`` on that is no white space."""
    while i < len(tokens) and _is_blank(tokens[i]):
        i += 1
    return i


def _is_name(token: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*", token) is not None


def _closing(tokens: list[str], i: int, opening: str, closing: str) -> int:
    """The index after the bracket that closes the one at ``i``."""
    depth = 0
    while True:
        depth += (tokens[i] == opening) - (tokens[i] == closing)
        i += 1
        if depth == 0:
            return i


def _threadgroup_variables(tokens: list[str]) -> list[str]:
    out: list[str] = []
    count, i, previous = 0, 0, ";"
    while i < len(tokens):
        declaration = None
        if tokens[i] == "threadgroup" and previous in (";", "{", "}"):
            declaration = _threadgroup_declaration(tokens, i)
        if declaration is None:
            out.append(tokens[i])
            previous = previous if _is_blank(tokens[i]) else tokens[i]
            i += 1
            continue
        type_name, declarators, end = declaration
        for name, dimensions in declarators:
            alias = f"emu_threadgroup_{count}"
            out.append(f"typedef {type_name} {alias}{dimensions}; ")
            out.append(f"threadgroup {alias}& {name} = EMU_THREADGROUP({count}, {alias});")
            count += 1
        out.append("\n" * "".join(tokens[i:end]).count("\n"))
        i, previous = end, ";"
    return out


def _threadgroup_declaration(tokens: list[str], start: int) -> tuple[str, list[tuple[str, str]], int] | None:
    """Type, (name, dimensions) of each variable and end of the declaration at ``start``; None for a pointer."""
    i = begin = _next(tokens, start + 1)
    while True:
        i = _next(tokens, i + 1)
        if tokens[i] == "<":
            i = _next(tokens, _closing(tokens, i, "<", ">"))
        if tokens[i] != "::":
            break
        i = _next(tokens, i + 1)
    type_name = "".join(tokens[begin:i]).strip()
    declarators = []
    while _is_name(tokens[i]):
        name, first = tokens[i], _next(tokens, i + 1)
        i = first
        while tokens[i] == "[":
            i = _next(tokens, _closing(tokens, i, "[", "]"))
        declarators.append((name, "".join(tokens[first:i]).strip()))
        if tokens[i] == ";":
            return type_name, declarators, i + 1
        if tokens[i] != ",":
            return None
        i = _next(tokens, i + 1)
    return None


def _vector_constructors(tokens: list[str]) -> list[str]:
    out = list(tokens)
    for i, token in enumerate(tokens):
        opening = _next(tokens, i + 1)
        if token != "vec" or opening >= len(tokens) or tokens[opening] != "<":
            continue
        end = _closing(tokens, opening, "<", ">")
        call = _next(tokens, end)
        if call < len(tokens) and tokens[call] == "(":
            out[i] = "emu_make<vec"
            out[end - 1] = ">>"
            if i >= 2 and tokens[i - 1] == "::" and tokens[i - 2] == "metal":
                out[i - 2] = out[i - 1] = ""
    return out


def _function_constants(source: str, values: Mapping[str, int | bool]) -> str:
    def define(match: re.Match[str]) -> str:
        return f"constexpr constant {match[1]} {match[2]} = {int(values.get(match[2], 0))};"

    return re.sub(r"constant\s+(\w+)\s+(\w+)\s*\[\[function_constant\(\d+\)\]\]\s*;", define, source)
