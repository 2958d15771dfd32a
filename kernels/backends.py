"""The kernel backends, and which one serves a device.

A backend is a module with three functions, and nothing else is asked of it::

    is_available() -> (bool, reason)                 # can this machine run it at all? cached, no compile
    has_fused_kernel(signature) -> (bool, reason)    # can it take calls of this Signature? cached by signature;
                                                     # the first use of a kernel family may compile and check it here
    attend(call) -> array                            # [B, Hq, L, Dv], Dv the stored row length, in the queries' dtype

``attend`` is called only after ``has_fused_kernel`` said yes. When it cannot take this very call after all (traced
arrays, say) it raises :class:`Declined` with the reason, and the call goes to the next route.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol, cast

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall, Signature

__all__ = ["BACKENDS", "CHOICES", "Backend", "Declined", "default_backend_name", "load_backend"]

BACKENDS = ("metal", "cuda", "cpu")
CHOICES = ("auto", *BACKENDS, "ops")
"""What the ``kernels`` option takes; ``ops`` is no backend: it turns fused kernels off."""


class Declined(Exception):
    """A backend cannot take this call; the argument says why."""


class Backend(Protocol):
    """What a backend module provides. See the module's docstring."""

    def is_available(self) -> tuple[bool, str]: ...

    def has_fused_kernel(self, signature: Signature) -> tuple[bool, str]: ...

    def attend(self, call: AttentionCall) -> mx.array: ...


@cache
def load_backend(name: str) -> Backend:
    """The backend called ``name``, one of :data:`BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"kernels={name!r} is unknown: use one of {', '.join(map(repr, CHOICES))}")
    return cast(Backend, importlib.import_module(f"qsdpa_patch.kernels.{name}.backend"))


def default_backend_name() -> str:
    """The backend of MLX's default device: ``metal`` or ``cuda`` for a GPU, else ``cpu``."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return "metal" if mx.metal.is_available() else "cuda"
    return "cpu"
