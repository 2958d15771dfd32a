"""Counters for the launches of CUDA kernels: enough of them, none shared while it may be in use."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.cuda import tickets
from qsdpa_patch.kernels.cuda.tickets import take_tickets, ticket_size
from tests.threads import run_in_threads


@pytest.fixture(autouse=True)
def few_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of 256 arrays, none of which was handed out before."""
    monkeypatch.setattr(tickets, "_ARRAYS", 256)
    monkeypatch.setattr(tickets, "_thread", tickets._Thread())


@pytest.mark.parametrize("count", [1, 32, 256, 257, 5000])
def test_counters_are_enough_and_zero(count: int) -> None:
    for _ in range(3):
        taken = take_tickets(ticket_size(count))
        assert taken.dtype == mx.uint32
        assert taken.size >= count
        assert mx.sum(taken).item() == 0


def test_an_array_comes_back_after_all_others() -> None:
    first = [take_tickets(ticket_size(8)) for _ in range(256)]
    assert len({id(x) for x in first}) == 256
    assert all(take_tickets(ticket_size(8)) is x for x in first)


def test_counts_of_one_size_share_arrays() -> None:
    first = [take_tickets(ticket_size(8)) for _ in range(100)]
    assert not {id(x) for x in first} & {id(take_tickets(ticket_size(9))) for _ in range(100)}


def test_threads_have_arrays_of_their_own() -> None:
    taken: list[list[mx.array]] = [[] for _ in range(4)]
    run_in_threads(lambda i: taken[i].extend(take_tickets(ticket_size(8)) for _ in range(300)), 4)
    assert len({id(x) for arrays in taken for x in arrays}) == 4 * 256
