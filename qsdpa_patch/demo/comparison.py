"""The measurements of the demo: one model, generating over an unquantized cache and over quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

import qsdpa_patch
from qsdpa_patch.demo.fidelity import Fidelity, compare_distributions, quantized_prompt_cache
from qsdpa_patch.demo.texts import passage
from qsdpa_patch.kernels.dtypes import dtype_name
from qsdpa_patch.report import Report

__all__ = ["CacheResult", "Comparison", "Generation", "compare"]

UNQUANTIZED = "unquantized"


@dataclass(frozen=True)
class Generation:
    """What greedy decoding gave over one cache."""

    text: str
    tokens: list[int]
    tokens_per_second: float


@dataclass(frozen=True)
class CacheResult:
    """One cache: what it generated, what it takes, and how close to the unquantized one it is.

    bits: ``None`` for the unquantized cache.
    cache_bytes: allocated for the text of ``fidelity``, by all layers.
    float16_bytes: what the unquantized cache allocates for it, in 16-bit numbers.
    same_tokens: length of the common beginning of ``generation.tokens`` and those over the unquantized cache.
    """

    bits: int | None
    generation: Generation
    cache_bytes: int
    float16_bytes: int
    same_tokens: int
    fidelity: Fidelity


@dataclass(frozen=True)
class Comparison:
    """All caches, the unquantized one first, and where their attention calls went."""

    prompt: str
    dtype: str
    results: list[CacheResult]
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data."""
        results = [asdict(result) for result in self.results]
        return {"prompt": self.prompt, "dtype": self.dtype, "results": results, "report": self.report.to_dict()}


def compare(
    model: Any,
    tokenizer: Any,
    *,
    prompt: str,
    bits: Sequence[int],
    group_size: int = 64,
    max_tokens: int,
    text_tokens: int,
    kernels: str = "auto",
    rotate: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Generate from ``prompt`` over every cache, then feed all of them the same passage, with the patch on throughout.

    Args:
        model, tokenizer: as :func:`mlx_lm.load` gives them.
        bits, group_size: of the quantized caches; they are quantized from the prompt on.
        max_tokens: to generate at most.
        text_tokens: tokens of :func:`~qsdpa_patch.demo.texts.passage` to compare distributions on.
        kernels, rotate: as :func:`qsdpa_patch.enable` takes them.
        progress: called with a few words before each step.
    """
    tokens = _text_tokens(tokenizer, text_tokens)
    with qsdpa_patch.enabled(kernels=kernels, rotate=rotate):
        qsdpa_patch.reset_report()
        generations = {}
        for choice in (None, *bits):
            progress(f"generating, {_label(choice)} cache")
            generations[choice] = _generate(model, tokenizer, prompt, max_tokens, choice, group_size)
        progress(f"comparing next-token distributions on {len(tokens)} tokens of text")
        caches: dict[str, list[Any]] = {UNQUANTIZED: make_prompt_cache(model)}
        caches |= {_label(choice): quantized_prompt_cache(model, choice, group_size) for choice in bits}
        fidelities = compare_distributions(model, tokens, caches, reference=UNQUANTIZED)
        report = qsdpa_patch.report()
    float16_bytes = sum(2 * x.size for x in _floating_arrays(caches[UNQUANTIZED]))
    wanted = generations[None].tokens
    results = [
        CacheResult(
            bits=choice,
            generation=generation,
            cache_bytes=sum(c.nbytes for c in caches[_label(choice)]),
            float16_bytes=float16_bytes,
            same_tokens=_common_beginning(wanted, generation.tokens),
            fidelity=fidelities[_label(choice)],
        )
        for choice, generation in generations.items()
    ]
    return Comparison(prompt, dtype_name(_floating_arrays(caches[UNQUANTIZED])[0].dtype), results, report)


def _label(bits: int | None) -> str:
    return UNQUANTIZED if bits is None else f"{bits}-bit"


def _generate(
    model: Any, tokenizer: Any, prompt: str, max_tokens: int, bits: int | None, group_size: int
) -> Generation:
    """Greedy decoding through mlx-lm's own entry point."""
    text, tokens, speed = "", [], 0.0
    options: dict[str, Any] = {"max_tokens": max_tokens}
    if bits is not None:
        options |= {"kv_bits": bits, "kv_group_size": group_size, "quantized_kv_start": 0}
    prompt_tokens = _prompt_tokens(tokenizer, prompt)
    for response in mlx_lm.stream_generate(model, tokenizer, prompt_tokens, **options):
        text += response.text
        tokens.append(response.token)
        speed = response.generation_tps
    return Generation(text, tokens, speed)


def _prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        tokens: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    else:
        tokens = tokenizer.encode(prompt)
    return tokens


def _text_tokens(tokenizer: Any, count: int) -> list[int]:
    tokens: list[int] = tokenizer.encode(passage())[:count]
    return tokens


def _common_beginning(left: Sequence[int], right: Sequence[int]) -> int:
    same = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        same += 1
    return same


def _floating_arrays(cache: list[Any]) -> list[mx.array]:
    leaves: Any = tree_flatten([c.state for c in cache])
    return [x for _, x in leaves if isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating)]
