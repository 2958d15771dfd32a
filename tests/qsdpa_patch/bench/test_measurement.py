"""Paths timed in turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

import qsdpa_patch
from qsdpa_patch.bench.measurement import DEQUANTIZED, OURS, TimedPath, measure


def test_runs_take_turns() -> None:
    order: list[str] = []

    def recorded(name: str) -> TimedPath:
        return TimedPath(name, lambda calls: order.append(f"{name}{calls}"))

    paths = [recorded("a"), recorded("b")]
    measurements = measure(paths, seconds=0, calls=5)
    assert order == ["a1", "a5", "b1", "b5"] + ["a5", "b5"] * 3  # a call and a run to warm up, then three runs
    assert [len(m.samples) for m in measurements] == [3, 3]
    assert all(m.calls_per_run == 5 and not m.error for m in measurements)


def test_runs_until_the_time_is_used() -> None:
    clock = 0.0

    def tick(calls: int) -> None:
        nonlocal clock
        clock += 0.25 * calls

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: clock)
        (measurement,) = measure([TimedPath("a", tick)], seconds=5, calls=2)
    assert measurement.samples == [0.25] * 10


def test_slow_paths_get_fewer_runs() -> None:
    clock = 0.0

    def tick(calls: int) -> None:
        nonlocal clock
        clock += 4 * calls

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: clock)
        slow, fast = measure([TimedPath("slow", tick), TimedPath("fast", lambda calls: None)], seconds=0, calls=1)
        (patient,) = measure([TimedPath("slow", tick)], seconds=1, calls=1)
    assert [len(m.samples) for m in (slow, fast, patient)] == [2, 3, 3]


def test_long_calls_are_timed_one_by_one() -> None:
    """Those that are long without what the first call compiles."""
    clock, first = 0.0, True

    def tick(calls: int) -> None:
        nonlocal clock
        clock += 0.6 * calls

    def compile_first(calls: int) -> None:
        nonlocal clock, first
        clock += 0.1 * calls + 3 * first
        first = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: clock)
        long, short = measure([TimedPath("long", tick), TimedPath("short", compile_first)], seconds=0, calls=8)
    assert (long.calls_per_run, short.calls_per_run) == (1, 8)
    assert [long.samples, short.samples] == [pytest.approx([0.6] * 3), pytest.approx([0.1] * 3)]


def test_a_failing_path_leaves_the_others_alone() -> None:
    def fail(calls: int) -> None:
        raise RuntimeError("[quantized_matmul] No implementation for problem shape")

    broken, fine = measure([TimedPath("broken", fail), TimedPath("fine", lambda calls: None)], seconds=0, calls=1)
    assert broken.error == "RuntimeError: [quantized_matmul] No implementation for problem shape"
    assert not broken.samples
    assert not fine.error
    assert len(fine.samples) == 3


def test_a_failure_later_on() -> None:
    runs = iter([None, None])  # one to warm up, one sample
    late, fine = measure(
        [TimedPath("late", lambda calls: next(runs)), TimedPath("fine", lambda calls: None)], seconds=0, calls=1
    )
    assert late.error.startswith("StopIteration")
    assert not late.samples
    assert len(fine.samples) == 3


def test_a_failing_preparation() -> None:
    def fail() -> None:
        raise ValueError("mlx-lm has no nvfp4 cache")

    (measurement,) = measure([TimedPath("a", lambda calls: None, prepare=fail)], seconds=0, calls=1)
    assert measurement.error == "ValueError: mlx-lm has no nvfp4 cache"


def test_context_is_entered_around_every_run() -> None:
    events: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        events.append("in")
        yield
        events.append("out")

    path = TimedPath("a", lambda calls: events.append("run"), context=context, prepare=lambda: events.append("prepare"))
    measure([path], seconds=0, calls=1)
    assert events == ["in", "prepare", "run", "out"] + ["in", "run", "out"] * 3


def test_peak_memory_is_that_of_one_call() -> None:
    held = mx.zeros(1 << 20)
    mx.eval(held)

    def run(calls: int) -> None:
        for _ in range(calls):
            mx.eval(mx.random.uniform(shape=(1 << 20,)))

    (measurement,) = measure([TimedPath("a", run)], seconds=0, calls=3)
    assert measurement.peak_bytes is not None
    assert 4 << 20 <= measurement.peak_bytes < 3 * (4 << 20)


def test_route_and_reason() -> None:
    x = mx.random.normal((1, 1, 4, 64))
    tensor = qsdpa_patch.quantize(x, qsdpa_patch.Format.affine(8))

    def run(calls: int) -> None:
        mx.eval(qsdpa_patch.quantized_scaled_dot_product_attention(x[:, :, :1], tensor, tensor, scale=1.0))

    path = TimedPath(OURS, run, context=lambda: qsdpa_patch.enabled(kernels="ops"))
    (measurement,) = measure([path], seconds=0, calls=1)
    assert measurement.route == "ops"
    assert "kernels='ops'" in measurement.reason


def test_difference_between_ours_and_the_other_code() -> None:
    paths = [
        TimedPath(OURS, lambda calls: mx.array([1.0, -2.0])),
        TimedPath("other", lambda calls: mx.array([9.0, 9.0])),
        TimedPath(DEQUANTIZED, lambda calls: mx.array([1.5, -4.0])),
    ]
    ours, *others = measure(paths, seconds=0, calls=1)
    assert ours.difference == 0.5
    assert all(other.difference is None for other in others)
