"""Every fault put into the attention kernels is found, and by what should find it. See mutations.py."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

from tests.metal.emulated_backend import EmulatedBackend
from tests.metal.mutations import MUTATIONS, Mutation, caught_by
from tests.metal.row_mutations import ROW_MUTATIONS, RowMutation, row_mutation_caught_by


@pytest.mark.skipif(mx.metal.is_available(), reason="faulty kernels are for the emulator, not for a GPU")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name for m in MUTATIONS])
def test_a_fault_is_found(metal: EmulatedBackend, mutation: Mutation) -> None:
    assert re.search(mutation.caught, caught_by(mutation, metal))


def test_without_a_fault_nothing_is_found(metal: EmulatedBackend) -> None:
    for case, steepness in dict.fromkeys((m.case, m.steepness) for m in MUTATIONS):
        unchanged = Mutation("none", "matrix.metal", "float", "float", "", case, steepness)
        assert caught_by(unchanged, metal) == "", case


@pytest.mark.skipif(mx.metal.is_available(), reason="faulty kernels are for the emulator, not for a GPU")
@pytest.mark.parametrize("mutation", ROW_MUTATIONS, ids=[m.name for m in ROW_MUTATIONS])
def test_a_fault_in_quantizing_rows_is_found(metal: EmulatedBackend, mutation: RowMutation) -> None:
    assert re.search(mutation.caught, row_mutation_caught_by(mutation))
