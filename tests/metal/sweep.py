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

import mlx.core as mx

from tests import attention_cases as cases
from tests.attention_cases import Case
from tests.kernels.double_precision import attend_in_double
from tests.metal.emulated_backend import EmulatedBackend, emulated_backend

__all__ = ["family", "mla_family", "prefill_family", "worst_errors"]

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


def worst_errors(backend: EmulatedBackend, calls: Iterator[Case]) -> dict[mx.Dtype, tuple[float, int]]:
    """The largest relative error and the number of calls, by dtype.

    Held against double precision: where keys have outliers, float32 attention in MLX's operations errs by more than the
    kernels, and by more than their tolerance.

    Raises:
        AssertionError: for a call that misses its tolerance, with the case.
    """
    worst: dict[mx.Dtype, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for index, case in enumerate(calls):
        call = cases.build(case)
        output = backend.attend(call, keys_per_split=(32, 256)[index % 2])
        error = cases.relative_error(output, attend_in_double(call))
        assert error <= cases.TOLERANCES[case.dtype], f"error {error:.1e}: {case}"
        error_so_far, count = worst[case.dtype]
        worst[case.dtype] = max(error_so_far, error), count + 1
    return dict(worst)


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
    totals: dict[mx.Dtype, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    with emulated_backend() as backend:
        for draw, families in kinds:
            for seed in range(options.first_seed, options.first_seed + families):
                for dtype, (error, count) in worst_errors(backend, draw(seed, options.variants)).items():
                    totals[dtype] = max(totals[dtype][0], error), totals[dtype][1] + count
    for dtype, (error, count) in totals.items():
        print(f"{dtype!s:24} {count:6} calls, largest error {error:.1e} (tolerance {cases.TOLERANCES[dtype]:.0e})")


if __name__ == "__main__":
    main()
