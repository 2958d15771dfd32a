"""Running the planned cases."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

import qsdpa_patch
from qsdpa_patch.bench.append_suite import append_paths
from qsdpa_patch.bench.attention_suite import attention_paths
from qsdpa_patch.bench.cases import Case
from qsdpa_patch.bench.latent_suite import latent_paths
from qsdpa_patch.bench.limits import measure_device_limits
from qsdpa_patch.bench.machine import describe_machine
from qsdpa_patch.bench.measurement import TimedPath, measure
from qsdpa_patch.bench.model_suite import llama_shape, model_paths, random_llama
from qsdpa_patch.bench.plan import SUITES
from qsdpa_patch.bench.results import BenchmarkRun, CaseResult

__all__ = ["BenchmarkOptions", "run_cases"]


@dataclass(frozen=True)
class BenchmarkOptions:
    """How to run the cases.

    kernels: as :func:`qsdpa_patch.enable` takes it.
    seconds: of measuring time for each path.
    calls: per timed run; ``None``: the suite's number for the device.
    model: for ``e2e``; ``None``: a random Llama with ``layers`` layers and the heads of the case.
    """

    kernels: str = "auto"
    seconds: float = 1.0
    calls: int | None = None
    model: Any = None
    layers: int = 4


def run_cases(
    cases: Sequence[Case],
    options: BenchmarkOptions,
    command: str,
    after_case: Callable[[BenchmarkRun], None] = lambda run: None,
) -> BenchmarkRun:
    """Run ``cases`` in order, with a line on standard error for each. Interrupted, it returns what there is.

    after_case: called with the results so far; whoever stores them loses nothing when the process ends early.
    """
    qsdpa_patch.disable()  # QSDPA_PATCH=1 may have enabled it, and mlx-lm's own path is to be timed too
    run = BenchmarkRun(describe_machine(), measure_device_limits(), command)
    try:
        for number, case in enumerate(cases, 1):
            progress = f"[{number}/{len(cases)}] {case.suite}: {case.label}, context {case.context}"
            print(progress, file=sys.stderr, flush=True)
            mx.random.seed(0)
            measurements = measure(_paths(case, options), seconds=options.seconds, calls=_calls(case, options))
            run.results.append(CaseResult.of(case, measurements))
            after_case(run)
            mx.clear_cache()
    except KeyboardInterrupt:
        print("interrupted; the results so far:", file=sys.stderr)
    run.limits = run.limits.or_better(measure_device_limits())
    return run


def _calls(case: Case, options: BenchmarkOptions) -> int:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    suite = SUITES[case.suite]
    return options.calls or (suite.cpu_calls if on_cpu else suite.gpu_calls)


def _paths(case: Case, options: BenchmarkOptions) -> list[TimedPath]:
    """The paths of a case, with their inputs made."""
    if case.suite == "mla":
        return latent_paths(case, options.kernels)
    if case.suite == "append":
        return append_paths(case)
    if case.suite == "e2e":
        model = options.model
        if model is None:
            model = random_llama(llama_shape(case, options.layers), case.dtype)
        return model_paths(case, options.kernels, model)
    return attention_paths(case, options.kernels)
