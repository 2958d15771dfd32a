"""How far a model's next-token distributions over a quantized cache are from those over an unquantized one."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from qsdpa_patch.routes import MAX_FUSED_QUERY_LENGTH

__all__ = [
    "FUSED_ROWS",
    "Fidelity",
    "Tally",
    "compare_distributions",
    "log_probabilities",
    "perplexity",
    "quantized_prompt_cache",
]

FUSED_ROWS = MAX_FUSED_QUERY_LENGTH
"""Tokens fed at a time: as many query rows as the fused kernels take, so that these are what is measured."""


@dataclass(frozen=True)
class Fidelity:
    """One cache against the unquantized one, over every position of a text (teacher-forced).

    greedy_agreement: share of positions where both name the same most probable next token.
    mean_kl, max_kl: KL divergence of the next-token distribution from the unquantized one, in nats.
    perplexity: of the text.
    """

    positions: int
    greedy_agreement: float
    mean_kl: float
    max_kl: float
    perplexity: float


@dataclass
class Tally:
    """Sums over the positions of a text."""

    agreements: float = 0
    divergence: float = 0
    max_divergence: float = 0
    surprisal: float = 0

    def add(self, wanted: mx.array, found: mx.array, following: Sequence[int]) -> None:
        """Count log-probabilities ``[positions, vocabulary]`` against the wanted ones."""
        # Rounding can take a divergence of zero slightly below it.
        divergences = mx.maximum((mx.exp(wanted) * (wanted - found)).sum(axis=-1), 0)
        self.agreements += _number((wanted.argmax(axis=-1) == found.argmax(axis=-1)).sum())
        self.divergence += _number(divergences.sum())
        self.max_divergence = max(self.max_divergence, _number(divergences.max()))
        self.surprisal += _surprisal(found, following)

    def result(self, positions: int) -> Fidelity:
        """What the sums come to for a text of ``positions`` tokens, two or more."""
        return Fidelity(
            positions=positions,
            greedy_agreement=self.agreements / positions,
            mean_kl=self.divergence / positions,
            max_kl=self.max_divergence,
            perplexity=math.exp(self.surprisal / (positions - 1)),
        )


def quantized_prompt_cache(model: Any, bits: int, group_size: int = 64) -> list[Any]:
    """A prompt cache of ``model`` that is quantized from the first token on, as mlx-lm makes it."""
    cache: list[Any] = make_prompt_cache(model)
    # Looked up at each call, since the patch replaces it. mlx_lm.generate is a function: the module has the same name.
    generate = importlib.import_module("mlx_lm.generate")
    generate.maybe_quantize_kv_cache(cache, quantized_kv_start=0, kv_group_size=group_size, kv_bits=bits)
    return cache


def compare_distributions(
    model: Any,
    tokens: Sequence[int],
    caches: Mapping[str, list[Any]],
    *,
    reference: str,
    chunk: int = FUSED_ROWS,
) -> dict[str, Fidelity]:
    """Feed ``tokens`` to ``model`` over each of ``caches``, and compare all with the one named ``reference``.

    The caches are empty at first and advance together, ``chunk`` tokens at a time, so that only one chunk of
    distributions is held.

    Returns:
        One :class:`Fidelity` for each name in ``caches``.
    """
    tallies = {name: Tally() for name in caches}
    for start in range(0, len(tokens), chunk):
        fed, following = tokens[start : start + chunk], tokens[start + 1 : start + chunk + 1]
        distributions = {name: log_probabilities(model, fed, cache) for name, cache in caches.items()}
        for name, found in distributions.items():
            tallies[name].add(distributions[reference], found, following)
    return {name: tally.result(len(tokens)) for name, tally in tallies.items()}


def perplexity(model: Any, tokens: Sequence[int], cache: list[Any], *, chunk: int = FUSED_ROWS) -> float:
    """Perplexity of ``tokens`` (the first is given), fed to ``model`` over the empty ``cache``, ``chunk`` at a time."""
    total = 0.0
    for start in range(0, len(tokens), chunk):
        found = log_probabilities(model, tokens[start : start + chunk], cache)
        total += _surprisal(found, tokens[start + 1 : start + chunk + 1])
    return math.exp(total / (len(tokens) - 1))


def log_probabilities(model: Any, tokens: Sequence[int], cache: list[Any]) -> mx.array:
    """``[len(tokens), vocabulary]`` float32: of what follows each of ``tokens``, which are appended to ``cache``."""
    logits: mx.array = model(mx.array(list(tokens))[None], cache=cache)[0]
    logits = logits.astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found, [c.state for c in cache])
    return found


def _surprisal(log_probabilities: mx.array, following: Sequence[int]) -> float:
    """Summed negative log-probability of the tokens that followed; after the last position of a text, none did."""
    if not following:
        return 0.0
    picked = mx.take_along_axis(log_probabilities[: len(following)], mx.array(list(following))[:, None], axis=-1)
    return -_number(picked.sum())


def _number(scalar: mx.array) -> float:
    value: Any = scalar.item()
    return float(value)
