"""The yardsticks of the CPU benchmark."""

from __future__ import annotations

import pytest

from qsdpa_patch.kernels.cpu import backend
from qsdpa_patch.kernels.cpu.limits import Limits, Work, measure_limits, work_of
from qsdpa_patch.kernels.format import Format
from tests.attention_cases import Case, build


def test_work_counts_packed_bytes_and_multiply_adds() -> None:
    case = Case(
        seed=1, batch=2, kv_heads=3, group=4, count=50, capacity=50, key_dim=128, value_dim=64,
        key_format=Format.affine(4, 64), value_format=Format.affine(8, 32),
    )  # fmt: skip
    call = build(case)
    work = work_of(call.signature, call.key_count)
    assert work.nbytes == call.keys.packed_nbytes + call.values.packed_nbytes
    assert work.multiply_adds == 2 * 12 * 50 * (128 + 64)


def test_work_of_causal_rows_leaves_out_what_is_hidden() -> None:
    call = build(Case(seed=1, kv_heads=1, count=10, capacity=10, length=4, mask="causal"))
    assert work_of(call.signature, 10).multiply_adds == (7 + 8 + 9 + 10) * 128


def test_a_shared_latent_is_read_once() -> None:
    call = build(Case(seed=1, kv_heads=1, group=16, count=20, capacity=20, key_dim=256, value_dim=256, rope_dim=64))
    work = work_of(call.signature, 20)
    assert work.nbytes == call.keys.packed_nbytes + 20 * 64 * 4
    assert work.multiply_adds == 16 * 20 * (256 + 64 + 256)


def test_the_nearer_limit_is_the_slower_one() -> None:
    limits = Limits(read_bandwidth=10.0, multiply_add_rate=100.0, threads=1)
    assert limits.seconds(Work(20, 100)) == 2.0
    assert limits.nearer(Work(20, 100)) == "read bandwidth"
    assert limits.seconds(Work(20, 500)) == 5.0
    assert limits.nearer(Work(20, 500)) == "multiply-adds"


@pytest.mark.skipif(not backend.is_available()[0], reason=backend.is_available()[1])
def test_rates_are_measured() -> None:
    limits = measure_limits(nbytes=8 << 20, multiply_adds=20_000_000)
    assert limits.read_bandwidth > 1e8
    assert limits.multiply_add_rate > 1e8
    assert limits.threads == backend.thread_count()
