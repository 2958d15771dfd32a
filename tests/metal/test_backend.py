"""The Metal backend around its kernels: what it takes, and what it does on a device that gets them wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.attention_call import check_call
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.metal import backend, first_use, plan
from qsdpa_patch.kernels.quantized_tensor import quantize
from tests import attention_cases as cases
from tests.attention_cases import Case
from tests.metal.broken_kernels import failing_kernels, wrong_kernels
from tests.metal.emulated_backend import EmulatedBackend

CASE = Case(seed=1, group=3, count=40, capacity=50)


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a Metal device here")
def test_without_a_metal_device_the_backend_says_so() -> None:
    available, reason = backend.is_available()
    assert not available
    assert "no Metal device" in reason
    assert backend.has_fused_kernel(cases.build(CASE).signature) == (False, reason)


def test_every_case_of_the_contract_has_a_fused_kernel(metal: EmulatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "check", lambda *_: (True, ""))
    for seed in range(40):
        for draw in (cases.random_case, cases.random_mla_case):
            case = draw(seed, max_count=20)
            assert metal.has_fused_kernel(cases.build(case).signature) == (True, ""), case


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query_heads": 2 * 129}, "129 query heads share a key head"),
        ({"key_dim": 544}, "rows of the keys have 544"),
        ({"value_dim": 40}, "rows of the values have 40"),
        ({"rope_dim": 24}, "rope term of 24"),
    ],
)
def test_what_no_kernel_takes_is_refused_with_the_reason(
    metal: EmulatedBackend, change: dict[str, Any], reason: str
) -> None:
    supported, given = metal.has_fused_kernel(cases.build(CASE).signature._replace(**change))
    assert not supported
    assert reason in given


def test_many_rows_go_to_mlx_where_it_has_a_fused_kernel(
    metal: EmulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = cases.build(replace(CASE, length=17)).signature
    monkeypatch.setattr(backend, "has_fused_sdpa", lambda _: (True, ""))
    supported, reason = metal.has_fused_kernel(signature)
    assert not supported
    assert "17 query rows, for which MLX has a fused kernel" in reason
    backend.has_fused_kernel.cache_clear()
    monkeypatch.setattr(backend, "has_fused_sdpa", lambda _: (False, "no kernel for these dims"))
    assert metal.has_fused_kernel(signature._replace(query_length=300)) == (True, "")


def test_the_first_use_of_a_family_is_checked_once(metal: EmulatedBackend) -> None:
    signature = cases.build(CASE).signature
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metal.has_fused_kernel(signature) == (True, "")
        launches = len(metal.costs)
        assert metal.has_fused_kernel(signature._replace(batch=3, kv_heads=4, query_heads=12)) == (True, "")
    assert len(metal.costs) == launches


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [(wrong_kernels, "wrong here by 1.0e"), (failing_kernels, "program_source:7:3: error: no such type")],
)
def test_a_kernel_that_is_wrong_or_does_not_compile_is_refused_with_one_warning(
    metal: EmulatedBackend, monkeypatch: pytest.MonkeyPatch, kernels: Callable[..., Any], reason: str
) -> None:
    monkeypatch.setattr(backend, "metal_kernel", kernels)
    signature = cases.build(CASE).signature
    with pytest.warns(RuntimeWarning, match="MLX's own operations") as given:
        supported, why = metal.has_fused_kernel(signature)
    assert len(given) == 1
    assert (kernels is failing_kernels) == ("1 error generated." in str(given[0].message)), "all that the compiler said"
    assert not supported
    assert reason in why
    assert "\n" not in why, "it is for a table"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metal.has_fused_kernel(signature._replace(batch=2)) == (False, why)


def test_what_is_not_a_number_is_wrong_in_any_launch(metal: EmulatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    made = backend.metal_kernel

    def without_numbers(**options: Any) -> Callable[..., list[mx.array]]:
        if options["name"] != "qsdpa_merge":
            return made(**options)
        return lambda **launch: [
            mx.full(s, mx.nan, d) for s, d in zip(launch["output_shapes"], launch["output_dtypes"])
        ]

    monkeypatch.setattr(backend, "metal_kernel", without_numbers)
    with pytest.warns(RuntimeWarning, match="is wrong here by nan"):
        assert not metal.has_fused_kernel(cases.build(CASE).signature)[0]


@pytest.mark.parametrize("length", [1, 6, 300])
@pytest.mark.parametrize("group", [1, 2, 3, 16])
def test_the_check_compiles_the_kernels_of_calls_with_many_heads(
    metal: EmulatedBackend, monkeypatch: pytest.MonkeyPatch, group: int, length: int
) -> None:
    """Whole and split, with arrays in the address space that they have there: of 8 numbers or more."""
    launched: set[str] = set()

    def recording(**options: Any) -> Callable[..., list[mx.array]]:
        def call(**launch: Any) -> list[mx.array]:
            launched.add(options["name"])
            assert [name for name, x in zip(options["input_names"], launch["inputs"]) if x.size < 8] == ["scale"] * (
                options["name"] != "qsdpa_merge"
            )
            return [mx.zeros(s, d) for s, d in zip(launch["output_shapes"], launch["output_dtypes"])]

        return call

    monkeypatch.setattr(backend, "metal_kernel", recording)
    monkeypatch.setattr(backend, "has_fused_sdpa", lambda _: (False, ""))
    monkeypatch.setattr(backend, "core_count", lambda: 10)
    case = replace(CASE, kv_heads=8, group=group, length=length, count=length, capacity=length, sinks=True)
    with pytest.warns(RuntimeWarning, match="is wrong here"):
        metal.has_fused_kernel(cases.build(case).signature)
    assert launched == {"qsdpa_decode", "qsdpa_decode_split", "qsdpa_merge"}


def test_the_check_leaves_the_random_state_alone(metal: EmulatedBackend) -> None:
    signature = cases.build(CASE).signature
    mx.random.seed(5)
    wanted = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    metal.has_fused_kernel(signature)
    assert mx.random.uniform(shape=(4,)).tolist() == wanted


def test_no_kernel_is_compiled_as_keys_grow(metal: EmulatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    made = backend.metal_kernel
    compiled: set[tuple[str, str, str]] = set()

    def recording(**options: Any) -> Callable[..., list[mx.array]]:
        kernel = made(**options)

        def call(**launch: Any) -> list[mx.array]:
            compiled.add((options["name"], options["header"] + options["source"], str(launch["template"])))
            return kernel(**launch)

        return call

    monkeypatch.setattr(backend, "metal_kernel", recording)
    for count in (20, 33, 300, 511, 512, 700):
        metal.attend(cases.build(replace(CASE, stacked=True, count=count, capacity=720)))
    assert sorted(name for name, *_ in compiled) == ["qsdpa_decode", "qsdpa_decode_split", "qsdpa_merge"]


def test_queries_of_any_layout_are_taken(metal: EmulatedBackend) -> None:
    call = cases.build(replace(CASE, length=4))
    transposed = mx.contiguous(call.queries.swapaxes(1, 2)).swapaxes(1, 2)
    assert mx.array_equal(metal.attend(replace(call, queries=transposed)), metal.attend(call))


@pytest.mark.parametrize("group", [2, 6])
def test_sinks_of_any_stride_are_taken(metal: EmulatedBackend, group: int) -> None:
    call = cases.build(replace(CASE, group=group, sinks=True))
    assert call.sinks is not None
    apart = mx.stack([call.sinks, -call.sinks], axis=1)[:, 0]
    for keys_per_split in (256, 16):
        wanted = metal.attend(call, keys_per_split)
        assert mx.array_equal(metal.attend(replace(call, sinks=apart), keys_per_split), wanted)


def test_rows_that_are_padded_to_32_numbers(metal: EmulatedBackend) -> None:
    """Head dim 72 is stored as 96, and the queries are padded with zeros."""
    queries, k, v = (
        mx.random.normal((1, h, n, 72), key=mx.random.key(i)) for i, (h, n) in enumerate(((4, 1), (2, 50), (2, 50)))
    )
    call = check_call(queries, quantize(k, Format.affine(8, 32)), quantize(v, Format.affine(4, 64)), scale=0.1)
    output = metal.attend(call)
    assert output.shape == (1, 4, 1, 96)
    assert cases.relative_error(output, cases.expected(call)) < 1e-5


def test_no_keys_give_zeros(metal: EmulatedBackend) -> None:
    full = cases.build(replace(CASE, dtype=mx.float16))
    empty = full.keys.map_parts(lambda p: p[:, :, :0])
    call = check_call(full.queries, empty, empty, scale=1.0)
    assert mx.array_equal(metal.attend(call), mx.zeros_like(full.queries))


def test_infinite_and_huge_masks_leave_other_keys_exact(metal: EmulatedBackend) -> None:
    call = cases.build(replace(CASE, dtype=mx.bfloat16))
    hidden = mx.arange(40) % 3 == 0
    wanted = metal.attend(replace(call, mask=~hidden[None, None, None], signature=call.signature._replace(mask="bool")))
    for value in (float("-inf"), -1e30, -3.38e38):
        mask = mx.where(hidden, value, 0).astype(mx.bfloat16)[None, None, None]
        masked = replace(call, mask=mask, signature=call.signature._replace(mask="additive"))
        assert mx.array_equal(metal.attend(masked), wanted)


@pytest.mark.parametrize(
    ("device", "cores"),
    [("Apple M2 Ultra", 76), ("Apple M3 Max", 40), ("Apple M4 Pro", 18), ("Apple M4", 10), ("", 10)],
)
def test_cores_are_told_by_the_name_of_the_device(monkeypatch: pytest.MonkeyPatch, device: str, cores: int) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: {"device_name": device})
    plan.core_count.cache_clear()
    assert plan.core_count() == cores
    plan.core_count.cache_clear()


@pytest.mark.parametrize("cores", [1, 10, 76, 1000])
@pytest.mark.parametrize("count", [1, 255, 511, 512, 8192, 131072])
def test_launches_are_within_bounds(cores: int, count: int) -> None:
    for seed in range(60):
        signature = cases.build(
            replace(cases.random_case(seed, max_count=3), count=20, capacity=20, mask="none")
        ).signature
        family = plan.family_of(signature)
        launch = plan.plan_launch(signature, family, count, cores)
        rows = signature.query_heads // signature.kv_heads * signature.query_length
        assert family.rows * launch.blocks >= rows
        assert family.rows * (launch.blocks - 1) < rows
        assert 1 <= launch.splits <= plan.MAX_SPLITS
        assert launch.splits == 1 or count // launch.splits >= plan.KEYS_PER_SPLIT
        assert 32 * family.simdgroups <= 256
