"""What becomes of each layer of each architecture with a quantized cache, found by running tiny models here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx

from qsdpa_patch.activation import enabled
from qsdpa_patch.architectures.sizes import NEEDS_METAL, NOT_BUILT, SIZES, VOCABULARY
from qsdpa_patch.architectures.tiny_models import build
from qsdpa_patch.layer_tags import kind_of, tag_of
from qsdpa_patch.report import Report, recorder

__all__ = ["TableRow", "architecture_rows", "leaves", "table"]

_FIRST_CHUNK, _NEXT_CHUNK = 29, 19
_NO_ROUTE = "-"
_FAILS = "fails: "


@dataclass(frozen=True)
class TableRow:
    """One kind of layer of an architecture.

    architecture: module under ``mlx_lm.models``.
    layers: ``"full"``, ``"sliding"``, ``"latent"``, ... as in the report; ``"shared"``: they attend to another's cache.
    cache: class that holds what these layers keep, once mlx-lm was asked to quantize.
    decode, prompt: routes of calls with one query row and with many; ``"-"`` where none comes past the dispatcher.
    reason: why something is not quantized or not fused.
    """

    architecture: str
    layers: str
    cache: str
    decode: str
    prompt: str
    reason: str

    @property
    def is_failure(self) -> bool:
        """Whether the architecture does not run."""
        return self.reason.startswith(_FAILS)


def table(architectures: Iterable[str] | None = None, bits: int = 4) -> Iterator[TableRow]:
    """The rows of all architectures, or of those given. The process's report is reset on the way."""
    for architecture in sorted({*SIZES, *NOT_BUILT}) if architectures is None else architectures:
        reason = NOT_BUILT.get(architecture) or ("" if mx.metal.is_available() else NEEDS_METAL.get(architecture, ""))
        if reason:
            yield TableRow(architecture, _NO_ROUTE, _NO_ROUTE, _NO_ROUTE, _NO_ROUTE, f"not tried: {reason}")
            continue
        try:
            yield from architecture_rows(architecture, bits)
        except Exception as error:  # one that fails must not hide the others
            yield TableRow(architecture, _NO_ROUTE, _NO_ROUTE, _NO_ROUTE, _NO_ROUTE, f"{_FAILS}{error}")


def architecture_rows(architecture: str, bits: int = 4) -> list[TableRow]:
    """The rows of one architecture: a tiny model of it reads a prompt in two chunks, and then a token."""
    is_gpu = mx.default_device().type == mx.DeviceType.gpu
    model = build(architecture, dtype=mx.bfloat16 if is_gpu else mx.float32)
    generate: Any = import_module("mlx_lm.generate")  # mlx_lm has a function of that name
    cache_module: Any = import_module("mlx_lm.models.cache")
    tokens = mx.random.randint(0, VOCABULARY, (1, _FIRST_CHUNK + _NEXT_CHUNK + 1))
    with enabled():
        caches = cache_module.make_prompt_cache(model)
        _feed(model, tokens[:, :_FIRST_CHUNK], caches)
        recorder.reset()
        generate.maybe_quantize_kv_cache(caches, 0, 64, bits)
        _feed(model, tokens[:, _FIRST_CHUNK:-1], caches)
        prompt = recorder.report()
        recorder.reset()
        generate.maybe_quantize_kv_cache(caches, 0, 64, bits)
        _feed(model, tokens[:, -1:], caches)
        decode = recorder.report()
    classes = {(tag.kind if (tag := tag_of(c)) else kind_of(c)): type(c).__qualname__ for c in leaves(caches)}
    for row in (*prompt.rows, *decode.rows):
        if row.reason != "not quantized":
            classes.setdefault(row.layer_kind, "that of another layer")
    return [
        TableRow(architecture, kind, name, _routes(decode, kind), _routes(prompt, kind), _reasons(prompt, decode, kind))
        for kind, name in classes.items()
    ]


def leaves(caches: Any) -> Iterator[Any]:
    """The single caches of a list, those in a ``CacheList`` included."""
    for cache in caches:
        if hasattr(cache, "caches"):
            yield from leaves(cache.caches)
        else:
            yield cache


def _feed(model: Any, tokens: mx.array, caches: list[Any]) -> None:
    mx.eval(model(tokens, cache=caches))


def _routes(report: Report, kind: str) -> str:
    return ", ".join(sorted({row.route for row in report.rows if row.layer_kind == kind})) or _NO_ROUTE


def _reasons(prompt: Report, decode: Report, kind: str) -> str:
    """Each reason once, those that hold for prompts alone marked as such."""
    reasons: dict[str, None] = {}
    for _, _, note in (n for n in (*prompt.notes, *decode.notes) if n[1] == kind):
        reasons[note] = None
    of_decoding = {row.reason for row in decode.rows if row.layer_kind == kind}
    for row in (*decode.rows, *prompt.rows):
        if row.layer_kind == kind and row.reason:
            reasons[row.reason if row.reason in of_decoding else f"prompts: {row.reason}"] = None
    return "; ".join(reasons)
