"""The files that commands write their results to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["check_writable", "json_file", "write_json"]


def json_file(option: str | None) -> Path | None:
    """The file that ``--json`` names: none without it, or for ``-``, standard output.

    Raises ``ValueError`` where it cannot be written, so that a command says so before it measures anything.
    """
    if option in (None, "-"):
        return None
    path = Path(option)
    check_writable("--json", path)
    return path


def check_writable(option: str, path: Path) -> None:
    """Raise ``ValueError`` where the file that ``option`` names cannot be written. It is not created."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} {path}: cannot be written; give a file in a folder that exists")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write ``document``, indented."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
