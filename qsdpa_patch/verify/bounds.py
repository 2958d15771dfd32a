"""The bounds that ``qsdpa verify`` holds results to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qsdpa_patch.verify.measurement import FUSED, OPS, UNQUANTIZED, Result

__all__ = ["Bounds", "exceeded"]


@dataclass(frozen=True)
class Bounds:
    """Limits against the unquantized cache; ``None``: no limit.

    perplexity_increase: in percent. mean_kl, max_kl: in nats. agreement: the least share of positions with the same
    most probable token, in percent.
    """

    perplexity_increase: float | None = None
    mean_kl: float | None = None
    max_kl: float | None = None
    agreement: float | None = None


def exceeded(results: Sequence[Result], bounds: Bounds) -> list[str]:
    """A sentence for each limit that a cache of this package is beyond, and for each that the model cannot run over."""
    base = next(r.fidelity for r in results if r.name == UNQUANTIZED)
    assert base is not None
    sentences = []
    for result in results:
        if result.name not in (FUSED, OPS):
            continue
        found = result.fidelity
        if found is None:
            sentences.append(f"{result.name}: the model does not run: {result.error}")
            continue
        increase = 100 * (found.perplexity / base.perplexity - 1)
        for label, value, limit, unit in (
            ("perplexity is higher by", increase, bounds.perplexity_increase, " %"),
            ("mean KL divergence is", found.mean_kl, bounds.mean_kl, " nats"),
            ("the largest KL divergence is", found.max_kl, bounds.max_kl, " nats"),
        ):
            if limit is not None and not value <= limit:  # a value that is no number is beyond any limit
                sentences.append(f"{result.name}: {label} {value:.3g}{unit}; the bound is {limit:g}{unit}")
        agreement = 100 * found.greedy_agreement
        if bounds.agreement is not None and not agreement >= bounds.agreement:
            sentences.append(
                f"{result.name}: {agreement:.1f} % of the most probable tokens agree; the bound is "
                f"{bounds.agreement:g} %"
            )
    return sentences
