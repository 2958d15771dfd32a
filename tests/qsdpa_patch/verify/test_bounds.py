"""Bounds: what is beyond them, and what is not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qsdpa_patch.demo.fidelity import Fidelity
from qsdpa_patch.verify.bounds import Bounds, exceeded
from qsdpa_patch.verify.measurement import FUSED, OPS, STOCK, UNQUANTIZED, Result


def fidelity(perplexity: float, mean_kl: float = 0.05, max_kl: float = 2.0, agreement: float = 0.9) -> Fidelity:
    return Fidelity(100, agreement, mean_kl, max_kl, perplexity)


def results(found: Fidelity | None, error: str = "") -> list[Result]:
    base = Result(UNQUANTIZED, fidelity(20.0, 0, 0, 1), 0, 0)
    stock = Result(STOCK, None, 0, 0, "ValueError: no")
    return [base, stock, Result(FUSED, found, 0, 0, error)]


@pytest.mark.parametrize(
    ("bounds", "beyond"),
    [
        ({}, ""),
        ({"perplexity_increase": 5.1}, ""),
        ({"perplexity_increase": 4.9}, "perplexity is higher by 5 %; the bound is 4.9 %"),
        ({"mean_kl": 0.05}, ""),
        ({"mean_kl": 0.049}, "mean KL divergence is 0.05 nats; the bound is 0.049 nats"),
        ({"max_kl": 2}, ""),
        ({"max_kl": 1.5}, "the largest KL divergence is 2 nats; the bound is 1.5 nats"),
        ({"agreement": 90}, ""),
        ({"agreement": 91}, "90.0 % of the most probable tokens agree; the bound is 91 %"),
    ],
)
def test_each_bound(bounds: dict[str, Any], beyond: str) -> None:
    expected = [f"{FUSED}: {beyond}"] if beyond else []
    assert exceeded(results(fidelity(21.0)), Bounds(**bounds)) == expected


def test_no_number_is_beyond_every_bound() -> None:
    nan = fidelity(math.nan, math.nan, math.nan, math.nan)
    assert len(exceeded(results(nan), Bounds(100, 100, 100, 0))) == 4


def test_a_model_that_does_not_run_is_beyond_any_bound() -> None:
    assert exceeded(results(None, "TypeError: x"), Bounds()) == [f"{FUSED}: the model does not run: TypeError: x"]


def test_plain_ops_are_held_to_the_bounds_too() -> None:
    both = [*results(fidelity(20.0)), Result(OPS, fidelity(30.0), 0, 0)]
    assert exceeded(both, Bounds(10)) == [f"{OPS}: perplexity is higher by 50 %; the bound is 10 %"]
