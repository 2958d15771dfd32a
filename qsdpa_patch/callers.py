"""Who asks a cache for its rows: model code that only hands them on to attention gets them without lazy arrays.

A :class:`~qsdpa_patch.kernels.quantized_tensor.QuantizedTensor` can be used as an array anywhere, for which MLX is
asked for half a dozen operations that nearly never run. In most models rows go to ``scaled_dot_product_attention`` and
nowhere else, as their source shows: it is read once for each function. Where it shows anything else, or cannot be read,
the rows come as arrays.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from types import CodeType, FrameType

from qsdpa_patch.kernels.identity import cached_by_identity

__all__ = ["TAKES_STACK_MEMBERS", "only_attends"]

TAKES_STACK_MEMBERS = "_qsdpa_takes_stack_members"
"""The attribute by which the function that stands for mlx-lm's attention is known: it is the function itself."""

_ATTENTION = "scaled_dot_product_attention"
_ATTRIBUTES = ("shape", "dtype", "ndim")
"""What else a function may ask of the rows."""
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_BRANCHES = (ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar, ast.Match)
"""Statements that are not looked through. A conditional is."""


def only_attends(caller: FrameType) -> bool:
    """Whether the function that runs in ``caller`` hands a cache's rows only to attention that takes stack members."""
    if not _reads_so(caller.f_code):
        return False
    attention = caller.f_globals.get(_ATTENTION)
    return attention is not None and getattr(attention, TAKES_STACK_MEMBERS, None) is attention


@cached_by_identity
def _reads_so(code: CodeType) -> bool:
    """Whether the source of ``code`` hands rows to attention alone. A source that cannot be read does not."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
        up_to_date = _is_up_to_date(code)
    except (OSError, TypeError, ValueError, SyntaxError):
        return False
    if not isinstance(function, ast.FunctionDef) or not up_to_date:
        return False
    if code.co_cellvars or _ATTENTION in (*code.co_varnames, *code.co_freevars):
        return False
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    if any(isinstance(node, (*_SCOPES, *_BRANCHES, ast.NamedExpr, ast.Delete)) for node in nodes):
        return False
    if any(isinstance(node, ast.Name) and node.id in ("locals", "eval", "exec", "vars") for node in nodes):
        return False
    updates = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "update_and_fetch"]
    targets = [rows for rows in map(_targets, (n for n in nodes if isinstance(n, ast.Assign))) if rows]
    return len(updates) == len(targets) > 0 and all(_is_handed_on(function.body, rows) for rows in targets)


def _is_up_to_date(code: CodeType) -> bool:
    """Whether the file of ``code`` still compiles to it: it may have changed since it was imported."""
    text = "".join(linecache.getlines(code.co_filename))
    pending = [compile(text, code.co_filename, "exec", dont_inherit=True)]
    while pending:
        inner = [x for x in pending.pop().co_consts if isinstance(x, CodeType)]
        if code in inner:
            return True
        pending += inner
    return False


_Update = tuple[ast.Assign, set[str]]


def _targets(statement: ast.Assign) -> _Update | None:
    """``keys, values = cache.update_and_fetch(...)``: the statement, and the two names."""
    call = statement.value
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
        return None
    if call.func.attr != "update_and_fetch" or len(statement.targets) != 1:
        return None
    (target,) = statement.targets
    if not (isinstance(target, ast.Tuple) and len(target.elts) == 2):
        return None
    names = {name.id for name in target.elts if isinstance(name, ast.Name)}
    return (statement, names) if len(names) == 2 else None


def _is_handed_on(body: list[ast.stmt], update: _Update) -> bool:
    """Whether what comes after ``update`` uses its rows for attention alone."""
    statement, names = update
    later = list(_after(body, statement))
    allowed: set[int] = set()
    for node in later:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == _ATTENTION:
            allowed.update(map(id, [*node.args, *(keyword.value for keyword in node.keywords)]))
        elif isinstance(node, ast.Attribute) and node.attr in _ATTRIBUTES:
            allowed.add(id(node.value))
    uses = [node for node in later if isinstance(node, ast.Name) and node.id in names]
    return all(id(node) in allowed and isinstance(node.ctx, ast.Load) for node in uses)


def _after(body: list[ast.stmt], statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of ``body`` that may run after ``statement``, which is somewhere in it."""
    for index, outer in enumerate(body):
        if not _contains([outer], statement):
            continue
        for branch in (getattr(outer, "body", []), getattr(outer, "orelse", [])):
            if _contains(branch, statement):
                yield from _after(branch, statement)
        for following in body[index + 1 :]:
            yield from ast.walk(following)


def _contains(body: list[ast.stmt], statement: ast.stmt) -> bool:
    return any(node is statement for outer in body for node in ast.walk(outer))
