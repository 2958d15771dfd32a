"""Random calls on the Metal kernels, against attention in double precision.

QSDPA_TEST_FAMILIES=1000 runs more families than the default; see sweep.py for what a family is.
"""

from __future__ import annotations

import os

import pytest

from tests.metal import sweep
from tests.metal.emulated_backend import EmulatedBackend

FAMILIES = int(os.environ.get("QSDPA_TEST_FAMILIES", "48"))


@pytest.mark.parametrize("seed", range(FAMILIES))
def test_decode_equals_the_reference(metal: EmulatedBackend, seed: int) -> None:
    sweep.errors(metal, sweep.family(seed, variants=5))


@pytest.mark.parametrize("seed", range(FAMILIES // 4))
def test_prefill_equals_the_reference(metal: EmulatedBackend, seed: int) -> None:
    sweep.errors(metal, sweep.prefill_family(seed, variants=2))


@pytest.mark.parametrize("seed", range(FAMILIES // 6))
def test_mla_decode_equals_the_reference(metal: EmulatedBackend, seed: int) -> None:
    sweep.errors(metal, sweep.mla_family(seed, variants=4))
