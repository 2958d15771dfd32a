"""What the package raises and warns with, beyond ValueError and TypeError."""

from __future__ import annotations

__all__ = ["FallbackError", "QSDPAWarning"]


class FallbackError(RuntimeError):
    """With ``strict``: a call would have fallen back to plain ops. The message says why."""


class QSDPAWarning(UserWarning):
    """Something works less well than asked for: an untested version, a name that could not be patched or restored."""
