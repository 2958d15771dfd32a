"""Numbers on the command line, checked: for ``type=`` of an ``argparse`` argument."""

from __future__ import annotations

import argparse

__all__ = ["at_least_two", "positive"]


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _bounded(text, 1)


def at_least_two(text: str) -> int:
    """A whole number from 2 on."""
    return _bounded(text, 2)


def _bounded(text: str, least: int) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value
