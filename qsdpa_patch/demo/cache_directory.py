"""Where downloads and converted models are kept between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """The user's cache directory of this package (it may not exist yet).

    ``QSDPA_CACHE_DIR`` if set; else ``~/Library/Caches/qsdpa_patch`` on macOS, and ``$XDG_CACHE_HOME/qsdpa_patch`` or
    ``~/.cache/qsdpa_patch`` elsewhere.
    """
    if override := os.environ.get("QSDPA_CACHE_DIR"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qsdpa_patch"
    # The XDG specification says to ignore a path that is not absolute.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "qsdpa_patch"
