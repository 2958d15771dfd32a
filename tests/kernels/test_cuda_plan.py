"""The CUDA backend's plans and sources, as far as they go without a GPU."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.cuda import backend
from qsdpa_patch.kernels.cuda.device import HOPPER, DeviceLimits
from qsdpa_patch.kernels.cuda.plan import DecodePlan, Unsupported, decode_plan
from qsdpa_patch.kernels.cuda.source import decode_body, decode_inputs, headers, prologue
from qsdpa_patch.kernels.format import Format
from tests.attention_cases import build, random_case, random_mla_case

ADA = DeviceLimits((8, 9), 128, 100 * 1024, 99 * 1024)


def _signature(**changes: object) -> Signature:
    four = Format.affine(4)
    base = Signature(1, 32, 8, 1, 128, 128, mx.float16, four, four, mx.float16, mx.float16, "none", False, 0, False)
    return base._replace(**changes)  # type: ignore[arg-type]


def _covered_rows(plan: DecodePlan) -> int:
    return plan.row_tiles * plan.rows


@pytest.mark.parametrize("limits", [HOPPER, ADA], ids=["hopper", "ada"])
@pytest.mark.parametrize("seed", range(40))
def test_plans_serve_all_rows_within_the_devices_limits(seed: int, limits: DeviceLimits) -> None:
    sig = build(random_case(seed, max_count=40)).signature
    plan = decode_plan(sig, limits)
    assert _covered_rows(plan) >= sig.query_heads // sig.kv_heads * sig.query_length
    assert plan.shared_bytes <= limits.shared_per_block
    assert plan.rows % plan.warps == 0
    assert plan.stages >= 2


def test_absorbed_mla_is_taken() -> None:
    for seed in range(10):
        sig = build(random_mla_case(seed, max_count=20)).signature
        for limits in (HOPPER, ADA):
            plan = decode_plan(sig, limits)
            assert _covered_rows(plan) >= sig.query_heads
            assert plan.warps % plan.team == 0


def test_blocks_along_the_keys_grow_with_the_context_until_the_device_is_full() -> None:
    plan = decode_plan(_signature(), HOPPER)
    splits = [plan.splits(count) for count in (1, 16, 300, 1024, 8192, 131072, 1 << 20)]
    assert splits[0] == 1
    assert splits == sorted(splits)
    assert splits[-1] * 8 <= HOPPER.multiprocessors < (splits[-1] + 1) * 8


def test_many_sequences_are_not_split_into_uneven_waves() -> None:
    plan = decode_plan(_signature(batch=32, query_heads=32), HOPPER)
    blocks = 32 * 8 * plan.splits(1 << 17)
    waves = -(-blocks // HOPPER.multiprocessors)
    assert blocks / (waves * HOPPER.multiprocessors) > 0.9


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_length": 17}, "query length 17"),
        ({"key_dim": 544}, "key dimension 544"),
        ({"value_dim": 1024}, "value dimension 1024"),
        ({"rope_dim": 40}, "rope dimension 40"),
    ],
)
def test_refusals_say_why(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        decode_plan(_signature(**changes), HOPPER)


def test_the_number_of_sequences_compiles_nothing_anew() -> None:
    bodies = {decode_body("k", decode_plan(_signature(batch=b), HOPPER), "bool", "float") for b in (1, 2, 7, 64)}
    assert len(bodies) == 1


@pytest.mark.parametrize("seed", range(12))
def test_bodies_name_every_input_and_no_other(seed: int) -> None:
    call = build(random_mla_case(seed, max_count=20) if seed % 3 == 0 else random_case(seed, max_count=20))
    sig = call.signature
    body = decode_body("k", decode_plan(sig, HOPPER), "bool", "float")
    viewed = set(re.findall(r"view\((\w+),", body))
    plain = {"scale", "tickets"} | ({"sinks"} if sig.has_sinks else set())
    assert viewed | plain == set(decode_inputs(sig))
    assert all(re.search(rf"\b{name}\b", body) for name in plain)
    assert ("mask" in viewed) == (sig.mask in ("bool", "additive"))


def test_headers_are_found_and_bounds_are_taken_back() -> None:
    paths = re.findall(r'#include "([^"]+)"', headers())
    assert [path.rsplit("/", 1)[-1] for path in paths] == ["ptx.cuh", "formats.cuh", "tiles.cuh", "decode.cuh"]
    for path in paths:
        with open(path) as file:
            assert "namespace qsdpa" in file.read()
    assert "#define custom_kernel_k __launch_bounds__(256) custom_kernel_k\n" in prologue("k", 256)
    plan = decode_plan(_signature(), HOPPER)
    assert decode_body("k", plan, "bool", "float").startswith("#undef custom_kernel_k\n")


@pytest.mark.skipif(backend.is_available()[0], reason="this machine has a CUDA device")
def test_without_a_device_the_backend_says_so() -> None:
    available, reason = backend.is_available()
    assert not available
    assert reason
    assert backend.has_fused_kernel(_signature()) == (False, reason)
