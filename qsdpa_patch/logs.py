"""The package's logger."""

from __future__ import annotations

import logging
import os

__all__ = ["configure_from_environment", "logger"]

logger = logging.getLogger("qsdpa_patch")

_LEVELS = ("off", "error", "warning", "info", "debug")


def configure_from_environment() -> None:
    """Set the logger's level by ``QSDPA_LOG`` (off, error, warning, info, debug); unset, it is left alone.

    Raises:
        ValueError: for another value.
    """
    text = os.environ.get("QSDPA_LOG", "").strip().lower()
    if not text:
        return
    if text not in _LEVELS:
        raise ValueError(f"QSDPA_LOG={text!r} is unknown: use one of {', '.join(_LEVELS)}")
    logger.setLevel(logging.CRITICAL + 1 if text == "off" else text.upper())
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("qsdpa_patch: %(message)s"))
        logger.addHandler(handler)
