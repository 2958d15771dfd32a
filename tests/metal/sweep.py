"""Random attention calls on the Metal kernels, drawn so that compiled kernels are used more than once.

Compiling takes longer than running in the emulator. So a sweep draws *families*, each of one case of
``tests.attention_cases``, and *variants* of each that need no other kernel: other batches, heads, numbers of keys,
buffer lengths and numbers of splits.

    python -m tests.metal.sweep --families 500

runs more than the tests do, and prints the number of calls and the worst errors.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from tests import attention_cases as cases
from tests.attention_cases import Case
from tests.kernels.double_precision import attend_in_double
from tests.metal.emulated_backend import EmulatedBackend, emulated_backend

__all__ = ["Errors", "errors", "family", "mla_family", "prefill_family"]

_SAME_KERNEL = {"bool": ("bool", "padding", "fully-masked-row")}


def family(seed: int, variants: int) -> Iterator[Case]:
    """``variants`` calls of ordinary attention that share their compiled kernels."""
    yield from _variants(cases.random_case(seed, max_count=300), variants)


def mla_family(seed: int, variants: int) -> Iterator[Case]:
    """The same of absorbed MLA decode."""
    yield from _variants(cases.random_mla_case(seed, max_count=150), variants)


def prefill_family(seed: int, variants: int) -> Iterator[Case]:
    """Calls with many query rows."""
    rng = random.Random(seed)
    first = cases.random_case(seed, max_count=100)
    length = rng.randint(17, 90)
    group = rng.choice((1, 2, 4))
    yield from _variants(
        replace(first, length=length, group=group, count=length + rng.randint(0, 100), capacity=200), variants
    )


def _variants(first: Case, variants: int) -> Iterator[Case]:
    rng = random.Random(first.seed)
    yield first
    for i in range(1, variants):
        count = max(first.length, rng.choice((rng.randint(1, 30), rng.randint(31, 200), 64, 128)))
        masks = next((kinds for kinds in _SAME_KERNEL.values() if first.mask in kinds), (first.mask,))
        yield replace(
            first,
            seed=first.seed + 100_000 * i,
            batch=rng.choice((1, 2)),
            kv_heads=1 if first.is_mla else rng.choice((1, 2, 3)),
            count=count,
            capacity=count + rng.choice((0, 1, 40)),
            mask=rng.choice(masks),
            outliers=rng.random() < 0.25 and not first.is_mla,
        )


class Errors(NamedTuple):
    """Of the calls of one dtype: how many, the largest relative error, and calls that float32 operations miss too."""

    calls: int = 0
    largest: float = 0.0
    missed: int = 0

    def and_those(self, other: Errors) -> Errors:
        return Errors(self.calls + other.calls, max(self.largest, other.largest), self.missed + other.missed)


def errors(backend: EmulatedBackend, calls: Iterator[Case]) -> dict[mx.Dtype, Errors]:
    """The errors by dtype, against double precision.

    Values with outliers may cancel in the output so far that attention in MLX's float32 operations misses the tolerance
    as well. Such a call is counted as missed, and left out of the largest error.

    Raises:
        AssertionError: for a call that misses its tolerance, and by more than those operations do; with the case.
    """
    found: dict[mx.Dtype, Errors] = defaultdict(Errors)
    for index, case in enumerate(calls):
        call = cases.build(case)
        output, exact = backend.attend(call, keys_per_split=(32, 256)[index % 2]), attend_in_double(call)
        error = cases.relative_error(output, exact)
        missed = error > cases.TOLERANCES[case.dtype]
        assert not missed or error <= cases.relative_error(cases.expected(call), exact), f"error {error:.1e}: {case}"
        found[case.dtype] = found[case.dtype].and_those(Errors(1, 0.0 if missed else error, int(missed)))
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold the Metal kernels against the reference on random calls.")
    parser.add_argument("--families", type=int, default=300, help="families of ordinary attention (default 300)")
    parser.add_argument("--mla-families", type=int, default=60, help="families of MLA decode (default 60)")
    parser.add_argument("--prefill-families", type=int, default=60, help="families of prefill (default 60)")
    parser.add_argument("--variants", type=int, default=6, help="calls of each family (default 6)")
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    kinds = (
        (family, options.families),
        (mla_family, options.mla_families),
        (prefill_family, options.prefill_families),
    )
    totals: dict[mx.Dtype, Errors] = defaultdict(Errors)
    with emulated_backend() as backend:
        for draw, families in kinds:
            for seed in range(options.first_seed, options.first_seed + families):
                for dtype, found in errors(backend, draw(seed, options.variants)).items():
                    totals[dtype] = totals[dtype].and_those(found)
    for dtype, (calls, largest, missed) in totals.items():
        tolerance = f"{cases.TOLERANCES[dtype]:.0e}, missed by {missed}"
        print(f"{dtype!s:24} {calls:6} calls, largest error {largest:.1e} (tolerance {tolerance})")


if __name__ == "__main__":
    main()
