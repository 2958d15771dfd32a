"""The route of each attention call over quantized keys and values: ``fused``, ``prefill`` or ``ops``.

The first that takes the call serves it, and the reason why an earlier one did not is counted with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from qsdpa_patch.errors import FallbackError
from qsdpa_patch.kernels import dequantized_sdpa, tiled_attention
from qsdpa_patch.kernels.attention_call import AttentionCall, Signature
from qsdpa_patch.kernels.backends import Declined, default_backend_name, load_backend
from qsdpa_patch.layer_tags import LayerTag
from qsdpa_patch.logs import logger
from qsdpa_patch.report import recorder
from qsdpa_patch.settings import DEFAULT_SETTINGS, Settings

__all__ = ["MAX_FUSED_QUERY_LENGTH", "Caller", "Router"]

MAX_FUSED_QUERY_LENGTH = 16
"""Query rows up to which the GPU kernels for decoding serve. More go to ``prefill``, unless a backend takes them."""


@dataclass(slots=True)
class Caller:
    """Who made a call, for the report, where no :class:`LayerTag` says so."""

    model_type: str = "(direct)"
    kind: str = "any"


_Decision = tuple[bool, str, Signature]
"""Whether a fused kernel takes calls of a signature, and if not, why. It keeps the signature alive, by whose identity
it is known: a hash would go through all of its fields."""


@dataclass
class Router:
    """Chooses routes under ``settings``, and remembers which fused kernels failed."""

    settings: Settings = DEFAULT_SETTINGS
    _decisions: dict[tuple[int, str], _Decision] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def update(self, settings: Settings) -> None:
        """Go by other settings from now on."""
        self.settings = settings

    def attend(self, call: AttentionCall, caller: Caller | LayerTag) -> mx.array:
        """Attention ``[B, Hq, L, Dv]`` of ``call``, by the first route that takes it."""
        name = self._backend_name()
        fused, reason, _ = self._decision(call.signature, name)
        if fused:
            out, reason = self._try_fused(call, name)
            if out is not None:
                _record(caller, "fused", "", call)
                return call.finish(out)
        route, attend = self._fallback(call, reason)
        _record(caller, route, reason, call)
        return call.finish(attend(call, self.settings.memory_budget))

    def has_fused_kernel(self, signature: Signature) -> tuple[bool, str]:
        """Whether the chosen backend takes calls of ``signature``, and if not, why."""
        return self._decision(signature, self._backend_name())[:2]

    def _backend_name(self) -> str:
        kernels = self.settings.kernels
        return default_backend_name() if kernels == "auto" else kernels

    def _decision(self, signature: Signature, name: str) -> _Decision:
        if name == "ops":
            return False, "kernels='ops' turns fused kernels off", signature
        decision = self._decisions.get((id(signature), name))
        return decision or self._decide(signature, name, *_ask_backend(name, signature))

    def _decide(self, signature: Signature, name: str, fused: bool, reason: str) -> _Decision:
        decision = fused, reason, signature
        with self._lock:
            self._decisions[id(signature), name] = decision
        return decision

    def route(self, call: AttentionCall) -> tuple[str, str]:
        """The route that ``call`` would take, and why not a better one; for ``doctor`` and tests."""
        fused, reason = self.has_fused_kernel(call.signature)
        return ("fused", "") if fused else (self._fallback(call, reason)[0], reason)

    def _try_fused(self, call: AttentionCall, name: str) -> tuple[mx.array | None, str]:
        """The result of backend ``name``, or ``None`` and the reason; a kernel that fails is not tried again."""
        try:
            return load_backend(name).attend(call), ""
        except Declined as declined:
            return None, str(declined)
        except Exception as error:  # whatever a kernel does, generation goes on
            reason = f"the {name} kernel failed: {error}"
            logger.warning("%s\nThis configuration goes to plain ops from now on: %s", reason, call.signature)
            self._decide(call.signature, name, False, reason)
            return None, reason

    def _fallback(self, call: AttentionCall, reason: str) -> tuple[str, Callable[[AttentionCall, int], mx.array]]:
        """The route of a call that no fused kernel takes, and its function."""
        many_rows = call.signature.query_length > MAX_FUSED_QUERY_LENGTH
        if self.settings.strict and not many_rows:
            raise FallbackError(f"no fused kernel takes this call: {reason} ({_describe(call)})")
        if call.rope is None and many_rows and dequantized_sdpa.has_fused_sdpa(call.signature)[0]:
            return "prefill", dequantized_sdpa.attend
        return ("prefill" if many_rows else "ops"), tiled_attention.attend


def _ask_backend(name: str, signature: Signature) -> tuple[bool, str]:
    try:
        backend = load_backend(name)
        available, reason = backend.is_available()
        return backend.has_fused_kernel(signature) if available else (False, reason)
    except Exception as error:  # a broken backend must not stop generation
        logger.warning("the %s kernels cannot be used: %s", name, error)
        return False, f"the {name} kernels cannot be used: {error}"


def _record(caller: Caller | LayerTag, route: str, reason: str, call: AttentionCall) -> None:
    """Count ``call``."""
    if not recorder.count(caller.model_type, caller.kind, route, reason):
        recorder.record(caller.model_type, caller.kind, route, reason, _describe(call))


def _describe(call: AttentionCall) -> str:
    sig = call.signature
    key_format, value_format = call.keys.format, call.values.format
    formats = str(key_format) if key_format == value_format else f"{key_format}/{value_format}"
    mask = "" if sig.mask == "none" else f" mask {sig.mask}"
    return (
        f"q [{sig.batch}, {sig.query_heads}, {sig.query_length}, {sig.key_dim}] "
        f"k [{sig.batch}, {sig.kv_heads}, {call.key_count}, {sig.key_dim}] {formats}{mask}"
    )
