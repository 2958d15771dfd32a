"""``qsdpa doctor --architectures``: what becomes of the layers of every model that mlx-lm has."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, astuple

from qsdpa_patch.architectures.sizes import NOT_BUILT, SIZES
from qsdpa_patch.architectures.table import TableRow, table

__all__ = ["add_arguments", "run"]

_HEADER = ("architecture", "layers", "cache", "decode", "prompt", "reason")
_WIDTHS = (21, 10, 28, 7, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--architectures",
        nargs="*",
        metavar="NAME",
        choices=sorted({*SIZES, *NOT_BUILT}),
        help="run a tiny random model of every architecture of mlx-lm, or of those named, with a 4-bit cache on this "
        "device, and print which cache and route each kind of layer gets, and why; the whole takes about a minute",
    )


def run(names: list[str], *, as_json: bool) -> int:
    """Print the table as it grows; 1 when an architecture fails."""
    rows: Iterable[TableRow] = table(names or None)
    if as_json:
        rows = list(rows)
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return int(any(row.is_failure for row in rows))
    print(_line(_HEADER))
    failed = False
    for row in rows:
        print(_line(astuple(row)), flush=True)
        failed |= row.is_failure
    return int(failed)


def _line(cells: tuple[str, ...]) -> str:
    return "  ".join((*(cell.ljust(width) for cell, width in zip(cells, _WIDTHS)), cells[-1])).rstrip()
