"""The CUDA backend's plans and sources, as far as they go without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.attention_call import Signature, check_call
from qsdpa_patch.kernels.cuda import backend
from qsdpa_patch.kernels.cuda.decode import DecodeByLength, DecodeKernel
from qsdpa_patch.kernels.cuda.decode_plan import DecodePlan, decode_plan
from qsdpa_patch.kernels.cuda.device import HOPPER, DeviceLimits
from qsdpa_patch.kernels.cuda.mla_plan import mla_plan
from qsdpa_patch.kernels.cuda.planning import Unsupported
from qsdpa_patch.kernels.cuda.prefill import PrefillKernel, prefill_kernel
from qsdpa_patch.kernels.cuda.prefill_plan import prefill_plan
from qsdpa_patch.kernels.cuda.source import (
    DECODE_HEADERS,
    MLA_HEADERS,
    PREFILL_HEADERS,
    WIDE_HEADERS,
    decode_body,
    decode_inputs,
    headers,
    mla_body,
    mla_inputs,
    mla_merge_body,
    mla_merge_inputs,
    prefill_body,
    prefill_inputs,
    prologue,
    stores_new_rows,
)
from qsdpa_patch.kernels.cuda.warpgroups import TILE
from qsdpa_patch.kernels.cuda.wide_plan import WidePlan, wide_plan
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import quantize
from tests.attention_cases import FORMATS, build, random_case, random_mla_case, random_wide_case

ADA = DeviceLimits((8, 9), 128, 100 * 1024, 99 * 1024)


def _signature(**changes: object) -> Signature:
    four = Format.affine(4)
    base = Signature(1, 32, 8, 1, 128, 128, mx.float16, four, four, mx.float16, mx.float16, "none", False, 0, False)
    return base._replace(**changes)  # type: ignore[arg-type]


def _covered_rows(plan: DecodePlan | WidePlan) -> int:
    return plan.row_tiles * plan.rows


@pytest.mark.parametrize("limits", [HOPPER, ADA], ids=["hopper", "ada"])
@pytest.mark.parametrize("seed", range(40))
def test_plans_serve_all_rows_within_the_devices_limits(seed: int, limits: DeviceLimits) -> None:
    sig = build(random_case(seed, max_count=40)).signature
    plan = decode_plan(sig, limits)
    assert _covered_rows(plan) >= sig.query_heads // sig.kv_heads * sig.query_length
    assert plan.shared_bytes <= limits.shared_per_block
    assert plan.rows == 4 or plan.rows % 8 == 0
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


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_bodies_name_every_input_and_no_other(seed: int, stacked: bool) -> None:
    call = build(random_mla_case(seed, max_count=20) if seed % 3 == 0 else random_case(seed, max_count=20))
    sig = call.signature
    body = decode_body("k", decode_plan(sig, HOPPER), "bool", "float", stacked=stacked)
    viewed = set(re.findall(r"view\((\w+),", body))
    plain = {"scale", "tickets"} | ({"sinks"} if sig.has_sinks else set()) | ({"written"} if stacked else set())
    assert viewed | plain == set(decode_inputs(sig, stacked))
    assert all(re.search(rf"\b{name}\b", body) for name in plain - {"written"})  # which only the graph needs
    assert ("new_keys" in viewed) == (stacked and stores_new_rows(sig))
    assert ("mask" in viewed) == (sig.mask in ("bool", "additive"))


@pytest.mark.parametrize(
    "names",
    [DECODE_HEADERS, WIDE_HEADERS, MLA_HEADERS, PREFILL_HEADERS],
    ids=["decode", "wide", "mla", "prefill"],
)
def test_the_last_header_includes_the_others_in_an_order_for_pasting(names: tuple[str, ...]) -> None:
    (path,) = map(Path, re.findall(r'#include "([^"]+)"', headers(names)))
    assert path.name == names[-1]
    needed = {names[-1]}
    for i, name in reversed(list(enumerate(names))):
        text = path.with_name(name).read_text()
        included = set(re.findall(r'#include "([^"]+)"', text))
        assert "namespace qsdpa" in text
        assert name in needed
        assert included <= set(names[:i])
        needed |= included
    assert needed == set(names)


def test_bounds_are_taken_back() -> None:
    assert "#define custom_kernel_k __launch_bounds__(256, 1) custom_kernel_k\n" in prologue("k", 256)
    plan = decode_plan(_signature(), HOPPER)
    assert decode_body("k", plan, "bool", "float").startswith("#undef custom_kernel_k\n")


def _mla_signature(**changes: object) -> Signature:
    mla = {"query_heads": 128, "kv_heads": 1, "key_dim": 512, "value_dim": 512, "rope_dim": 64, "shared_kv": True}
    return _signature(**(mla | changes))


@pytest.mark.parametrize("latent", [256, 512])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_warpgroup_products_take_absorbed_mla_of_every_format(format: Format, latent: int) -> None:
    scales = mx.float16 if format.is_affine else mx.uint8
    sig = _mla_signature(
        key_dim=latent, value_dim=latent, key_format=format, value_format=format, key_scale_dtype=scales
    )
    plan = mla_plan(sig, HOPPER)
    assert plan.row_tiles * plan.rows == 128
    assert plan.shared_bytes <= HOPPER.shared_per_block
    assert plan.stages >= 2
    assert plan.keys_to_check > plan.splits(plan.keys_to_check) * plan.stages * TILE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_heads": 16}, "16 query rows"),
        ({"dtype": mx.float32}, "16-bit queries"),
        ({"dtype": mx.bfloat16}, r"float16 scales with .*bfloat16"),
        ({"key_dim": 384, "value_dim": 384}, "not absorbed MLA"),
        ({"rope_dim": 128}, "not absorbed MLA"),
        ({"shared_kv": False}, "not absorbed MLA"),
        ({"query_length": 17}, "query length 17"),
    ],
)
def test_warpgroup_products_refuse_the_rest(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        mla_plan(_mla_signature(**changes), HOPPER)


def test_warpgroup_products_need_hopper() -> None:
    for limits in (ADA, replace(HOPPER, capability=(10, 0))):
        with pytest.raises(Unsupported, match="has no warpgroup products"):
            mla_plan(_mla_signature(), limits)


def test_no_block_of_absorbed_mla_is_without_keys() -> None:
    plan = mla_plan(_mla_signature(), HOPPER)
    splits = [plan.splits(count) for count in (1, TILE, TILE + 1, 1000, 1 << 17)]
    assert splits == [1, 1, 2, 16, HOPPER.multiprocessors // 2]


@pytest.mark.parametrize(("batch", "parts"), [(1, 4), (3, 2), (8, 1), (64, 1)])
def test_many_splits_of_absorbed_mla_are_merged_by_more_threads(batch: int, parts: int) -> None:
    plan = mla_plan(_mla_signature(batch=batch), HOPPER)
    assert (plan.merge_parts, plan.merge_threads) == (parts, 128 * parts)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("sinks", [False, True])
def test_bodies_of_absorbed_mla_name_every_input_and_no_other(mask: str, sinks: bool) -> None:
    sig = _mla_signature(mask=mask, has_sinks=sinks)
    plan = mla_plan(sig, HOPPER)
    body = mla_body("k", plan, "bool")
    assert set(re.findall(r"view\((\w+),", body)) | {"scale"} == set(mla_inputs(sig))
    merge = mla_merge_body("k", plan, "float")
    assert all(re.search(rf"\b{name}(_shape)?\b", merge) for name in mla_merge_inputs(sig))
    assert re.search(r"\bsinks\b", merge) is not None or not sinks


def _wide_signature(**changes: object) -> Signature:
    return _signature(**({"query_length": 8, "mask": "causal"} | changes))


@pytest.mark.parametrize("seed", range(40))
def test_plans_with_warpgroup_products_serve_all_rows_within_the_devices_limits(seed: int) -> None:
    case = random_wide_case(seed)
    sig = build(replace(case, count=16, capacity=16)).signature._replace(batch=64)
    if case.group * case.length <= 16 and case.value_dim <= 128:
        with pytest.raises(Unsupported, match="query rows"):
            wide_plan(sig, HOPPER)
        return
    plan = wide_plan(sig, HOPPER)
    assert _covered_rows(plan) >= case.group * case.length
    assert plan.rows in (16, 32)
    assert plan.stages >= 3
    assert plan.shared_bytes <= HOPPER.shared_per_block
    assert plan.keys_to_check > plan.splits(plan.keys_to_check) * plan.teams * plan.stages * TILE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_length": 4}, "16 query rows"),
        ({"query_length": 17}, "query length 17"),
        ({"dtype": mx.float32}, "16-bit queries"),
        ({"key_format": Format.affine(3)}, "3-bit g64: warpgroup products take 2, 4 and 8 bits"),
        ({"value_format": Format.affine(4, 32)}, "4-bit g32: warpgroup products take"),
        ({"value_format": Format.named("mxfp8"), "value_scale_dtype": mx.uint8}, "mxfp8: warpgroup products take"),
        ({"key_dim": 192}, "dimension 192"),
        ({"kv_heads": 1, "query_heads": 4}, "pay from 270336 keys on"),
        ({"rope_dim": 64}, "rope terms"),
        ({"shared_kv": True}, "values that are the keys"),
    ],
)
def test_warpgroup_products_for_some_query_rows_refuse_the_rest(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        wide_plan(_wide_signature(**changes), HOPPER)


@pytest.mark.usefixtures("hopper")
def test_warpgroup_products_take_long_contexts_of_more_rows_than_a_warp_holds_well() -> None:
    kinds = {
        (4, 128): DecodeKernel, (5, 128): DecodeByLength, (16, 128): DecodeByLength,
        (2, 256): DecodeKernel, (3, 256): DecodeByLength, (5, 256): DecodeKernel,
    }  # fmt: skip
    for (length, dim), kind in kinds.items():
        kernel = backend._kernel(_signature(query_length=length, key_dim=dim, value_dim=dim))
        assert isinstance(kernel, kind)
        if isinstance(kernel, DecodeByLength):
            assert isinstance(kernel.short.plan, DecodePlan)
            assert isinstance(kernel.long.plan, WidePlan)
        elif isinstance(kernel, DecodeKernel):
            assert isinstance(kernel.plan, WidePlan) == (length == 5)


def test_warpgroup_products_take_16_heads_of_256_dimensions_over_long_contexts() -> None:
    plan = wide_plan(_signature(kv_heads=2, key_dim=256, value_dim=256), HOPPER)
    assert plan.row_tiles * plan.rows == 16
    assert plan.splits(131072) * 2 == HOPPER.multiprocessors
    assert 32768 < plan.fewest_keys <= 65536


def test_the_kernel_is_chosen_by_the_length_of_the_context() -> None:
    four = Format.affine(4)
    short, long = (lambda call: mx.array(0)), (lambda call: mx.array(1))
    kernel = DecodeByLength(short, long, 100)  # type: ignore[arg-type]
    for count, chosen in ((99, 0), (100, 1), (1000, 1)):
        keys = quantize(mx.zeros((1, 1, count, 64), mx.float16), four)
        assert kernel(check_call(mx.zeros((1, 1, 1, 64), mx.float16), keys, keys, scale=1.0)).item() == chosen


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("failing", [WidePlan, DecodePlan])
def test_a_kernel_that_fails_its_check_leaves_all_contexts_to_the_other(
    monkeypatch: pytest.MonkeyPatch, failing: type
) -> None:
    monkeypatch.setattr(backend, "failure", lambda kernel: "wrong" if isinstance(kernel.plan, failing) else "")
    kernel = backend._kernel(_wide_signature())
    assert isinstance(kernel, DecodeKernel)
    assert not isinstance(kernel.plan, failing)


def _prefill_signature(**changes: object) -> Signature:
    return _signature(**({"query_length": 512, "key_dim": 256, "value_dim": 256, "mask": "causal"} | changes))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(256, 256), (512, 512), (192, 128), (128, 384)])
def test_many_query_rows_of_every_format_fit(key_dim: int, value_dim: int, format: Format) -> None:
    scales = mx.float16 if format.is_affine else mx.uint8
    keys, values = format.fit(key_dim)[0], format.fit(value_dim)[0]
    sig = _prefill_signature(
        key_dim=key_dim, value_dim=value_dim, key_format=keys, value_format=values, key_scale_dtype=scales,
        value_scale_dtype=scales,
    )  # fmt: skip
    plan = prefill_plan(sig, HOPPER)
    assert plan.row_tiles * plan.rows == 512 * 4
    assert plan.rows == (128 if value_dim <= 256 else 64)
    assert plan.shared_bytes <= HOPPER.shared_per_block


@pytest.mark.parametrize("value_dim", range(32, 513, 32))
@pytest.mark.parametrize("key_dim", range(32, 513, 32))
def test_many_query_rows_of_every_dimension_fit(key_dim: int, value_dim: int) -> None:
    """Few tiles are in shared memory only where two of each do not fit."""
    format = Format.affine(4, 32)
    sig = _prefill_signature(key_dim=key_dim, value_dim=value_dim, key_format=format, value_format=format)
    plan = prefill_plan(sig, HOPPER)
    assert plan.shared_bytes <= HOPPER.shared_per_block
    more = 2 * TILE * (key_dim * (plan.key_stages == 1) + value_dim * (plan.value_stages == 1))
    assert more == 0 or plan.shared_bytes + more > HOPPER.shared_per_block


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_length": 16}, "query length 16"),
        ({"key_dim": 544}, "key dimension 544"),
        ({"value_dim": 576}, "value dimension 576"),
        ({"rope_dim": 64}, "a rope term with 512 query rows"),
        ({"dtype": mx.float32}, "16-bit queries"),
        ({"value_scale_dtype": mx.bfloat16}, r"bfloat16 scales with .*float16"),
    ],
)
def test_the_kernel_for_many_query_rows_refuses_the_rest(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        prefill_plan(_prefill_signature(**changes), HOPPER)


def test_the_kernel_for_many_query_rows_needs_hopper() -> None:
    for limits in (ADA, replace(HOPPER, capability=(10, 0))):
        with pytest.raises(Unsupported, match="has no warpgroup products"):
            prefill_plan(_prefill_signature(), limits)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend as on a Hopper device whose kernels pass their checks."""
    monkeypatch.setattr(backend, "device_limits", lambda: HOPPER)
    monkeypatch.setattr(backend, "is_available", lambda: (True, ""))
    monkeypatch.setattr(backend, "failure", lambda kernel: "")
    caches = (backend.has_fused_kernel, backend._kernel)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_many_query_rows_go_to_mlx_where_it_has_a_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_fused_sdpa", lambda sig: (max(sig.key_dim, sig.value_dim) <= 128, ""))
    for key_dim, value_dim in ((256, 256), (512, 512), (192, 128), (128, 160)):
        sig = _prefill_signature(key_dim=key_dim, value_dim=value_dim, key_format=Format.affine(4, 32))
        sig = sig._replace(value_format=sig.key_format)
        assert backend.has_fused_kernel(sig) == (True, "")
        assert isinstance(backend._kernel(sig), PrefillKernel)
    taken, reason = backend.has_fused_kernel(_prefill_signature(key_dim=128, value_dim=128))
    assert not taken
    assert reason == "512 query rows, for which MLX has a fused kernel over dequantized keys"
    few = _prefill_signature(key_dim=128, value_dim=128, query_length=16)
    assert isinstance(backend._kernel(few), DecodeByLength)


@pytest.mark.usefixtures("hopper")
def test_a_prefill_kernel_that_fails_its_check_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []

    def fails(kernel: object) -> str:
        checked.append(kernel)
        return "wrong on this device"

    monkeypatch.setattr(backend, "has_fused_sdpa", lambda sig: (False, ""))
    monkeypatch.setattr(backend, "failure", fails)
    sig = _prefill_signature(query_length=4096, batch=3)
    assert backend.has_fused_kernel(sig) == (False, "wrong on this device")
    (kernel,) = checked
    assert isinstance(kernel, PrefillKernel)
    assert kernel.plan.signature.query_length < 64
    assert kernel.source == prefill_kernel(prefill_plan(sig, HOPPER)).source


def test_no_keys_give_zeros() -> None:
    keys = quantize(mx.zeros((1, 2, 0, 256), mx.float16), Format.affine(4))
    call = check_call(mx.ones((1, 4, 20, 256), mx.float16), keys, keys, scale=1.0)
    out = prefill_kernel(prefill_plan(call.signature, HOPPER))(call)
    assert out.shape == (1, 4, 20, 256)
    assert not out.any().item()


def test_the_number_of_query_rows_and_sequences_compiles_nothing_anew() -> None:
    changes = ({"query_length": 17}, {"query_length": 2048}, {"batch": 3}, {"query_heads": 8})
    plans = (prefill_plan(_prefill_signature(**change), HOPPER) for change in changes)
    assert len({prefill_body("k", plan, "bool", "float") for plan in plans}) == 1


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive"])
@pytest.mark.parametrize("sinks", [False, True])
def test_bodies_for_many_query_rows_name_every_input_and_no_other(mask: str, sinks: bool) -> None:
    sig = _prefill_signature(mask=mask, has_sinks=sinks)
    body = prefill_body("k", prefill_plan(sig, HOPPER), "bool", "float")
    plain = {"scale"} | ({"sinks"} if sinks else set())
    assert set(re.findall(r"view\((\w+),", body)) | plain == set(prefill_inputs(sig))
    assert all(re.search(rf"\b{name}\b", body) for name in plain)


@pytest.mark.skipif(backend.is_available()[0], reason="this machine has a CUDA device")
def test_without_a_device_the_backend_says_so() -> None:
    available, reason = backend.is_available()
    assert not available
    assert reason
    assert backend.has_fused_kernel(_signature()) == (False, reason)
