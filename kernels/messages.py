"""What compilers say, in short."""

from __future__ import annotations

__all__ = ["first_error"]

_LONGEST = 300


def first_error(output: str) -> str:
    """The line of ``output`` with the first error, or else its first line, cut to a length that fits in a table."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[0][:_LONGEST]
