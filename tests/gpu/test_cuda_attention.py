"""The CUDA kernels on a GPU, held against the float32 reference on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle, product

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.attention_call import AttentionCall, RopeTerm, Signature, check_call
from qsdpa_patch.kernels.cuda import backend, decode, tickets
from qsdpa_patch.kernels.cuda.decode import DecodeKernel
from qsdpa_patch.kernels.cuda.decode_plan import DecodePlan, decode_plan
from qsdpa_patch.kernels.cuda.device import HOPPER, DeviceLimits, device_limits
from qsdpa_patch.kernels.cuda.planning import Unsupported
from qsdpa_patch.kernels.cuda.wide_plan import WidePlan, wide_plan
from qsdpa_patch.kernels.format import FLOAT_FORMATS, Format
from qsdpa_patch.kernels.quantized_tensor import PackedStack, QuantizedTensor, quantize, stack_parts
from tests.attention_cases import (
    FORMATS,
    MASKS,
    TOLERANCES,
    Case,
    build,
    check_queries_that_are_not_finite,
    expected,
    random_case,
    random_mla_case,
    random_prefill_case,
    random_wide_case,
    relative_error,
)

_AVAILABLE, _REASON = backend.is_available()
pytestmark = pytest.mark.skipif(not _AVAILABLE, reason=_REASON)


def _check(call: AttentionCall, description: str) -> None:
    taken, reason = backend.has_fused_kernel(call.signature)
    assert taken, reason
    error = relative_error(backend.attend(call), expected(call))
    assert error <= TOLERANCES[call.signature.dtype], f"error {error:.2g} in {description}"


def _rebuilt(tensor: QuantizedTensor, change: Callable[[mx.array], mx.array]) -> QuantizedTensor:
    """``tensor`` with each of its parts changed."""
    codes, scales, *biases = map(change, tensor.parts)
    return QuantizedTensor(codes, scales, biases[0] if biases else None, tensor.format, dtype=mx.float16)


def _first_keys(count: int, part: mx.array) -> mx.array:
    return part[:, :, :count]


@pytest.mark.parametrize("seed", range(120))
def test_random_calls(seed: int) -> None:
    case = random_case(seed)
    _check(build(case), str(case))


@pytest.mark.parametrize("seed", range(24))
def test_random_mla_calls(seed: int) -> None:
    case = random_mla_case(seed)
    _check(build(case), str(case))


def _wide_kernel(signature: Signature) -> DecodeKernel | None:
    """The kernel with warpgroup products, where the device has them."""
    limits = device_limits()
    assert limits is not None
    if limits.capability != HOPPER.capability:
        return None
    # Of many sequences, with which the kernel is the same: of one, contexts may have to be longer for it.
    plan = wide_plan(signature._replace(batch=64), limits)
    return DecodeKernel(replace(plan, signature=signature, ideal_splits=16))


def _check_wide(call: AttentionCall, description: str) -> None:
    """By the kernels that take the call, and by the one with warpgroup products."""
    _check(call, description)
    if kernel := _wide_kernel(call.signature):
        error = relative_error(kernel(call), expected(call))
        assert error <= TOLERANCES[call.signature.dtype], f"error {error:.2g} in {description}"


@pytest.mark.parametrize("seed", range(80))
def test_random_calls_of_some_query_rows(seed: int) -> None:
    case = random_wide_case(seed)
    check = _check_wide if case.group * case.length > 16 else _check
    check(build(case), str(case))


_WIDE = Case(seed=1, kv_heads=2, group=4, length=8, count=20000, capacity=20100, key_dim=128, value_dim=128)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("format", [Format.affine(b, g) for b in (2, 4, 8) for g in (64, 128)], ids=str)
def test_some_query_rows_of_every_format(format: Format, dtype: mx.Dtype) -> None:
    """Several rounds of tiles, with outlier channels."""
    case = replace(_WIDE, dtype=dtype, key_format=format, value_format=format, outliers=True, mask="causal")
    _check_wide(build(case), str(case))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dim", [128, 256])
def test_some_query_rows_with_masks_and_sinks(dim: int, mask: str) -> None:
    case = replace(_WIDE, dtype=mx.float16, key_dim=dim, value_dim=dim, mask=mask, sinks=True)
    case = replace(case, batch=2, group=5, length=5, count=3001, capacity=3001)
    _check_wide(build(case), str(case))


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("format", [Format.affine(4), Format.affine(8, symmetric=True)], ids=str)
def test_magnitudes_of_values_with_some_query_rows(format: Format, dtype: mx.Dtype, size: float) -> None:
    """Of very different size by key, and at first all alike, which makes scales tiny beside biases."""
    mx.random.seed(3)
    queries, keys, values = (mx.random.normal((1, heads, n, 128)) for heads, n in ((8, 8), (2, 4001), (2, 4001)))
    values = values * size * mx.exp(2 * mx.random.normal((1, 2, 4001, 1)))
    values[:, :, :1000] = size * mx.random.normal((1, 2, 1000, 1))
    packed = [quantize(x.astype(dtype), format) for x in (keys, mx.clip(values, -6e4, 6e4))]
    _check_wide(check_call(queries.astype(dtype), *packed, scale=0.1), f"{format} {dtype} values of size {size}")


@pytest.mark.parametrize("scale", [0.0, -0.05, 0.5])
@pytest.mark.parametrize("mask", ["none", "additive"])
def test_scales_out_of_the_ordinary_with_some_query_rows(mask: str, scale: float) -> None:
    call = build(replace(_WIDE, dtype=mx.float16, count=500, capacity=500, mask=mask))
    _check_wide(replace(call, scale=scale), f"scale {scale}")


@pytest.mark.parametrize("mask", ["none", "additive"])
def test_some_query_rows_that_are_not_finite(mask: str) -> None:
    call = build(replace(_WIDE, dtype=mx.float16, count=500, capacity=500, mask=mask))
    check_queries_that_are_not_finite(backend.attend, call)
    if kernel := _wide_kernel(call.signature):
        check_queries_that_are_not_finite(kernel, call)


_FORMATS_AND_DTYPES = list(zip(FORMATS, cycle((mx.float16, mx.bfloat16)), strict=False))
_MLA = Case(seed=1, kv_heads=1, group=128, count=9001, capacity=9100, key_dim=512, value_dim=512, rope_dim=64)


@pytest.mark.parametrize(("format", "dtype"), _FORMATS_AND_DTYPES, ids=str)
def test_absorbed_mla_of_every_format(format: Format, dtype: mx.Dtype) -> None:
    """More keys than one round of tiles of all blocks, the last tile in part, with outlier channels."""
    case = replace(_MLA, dtype=dtype, key_format=format, value_format=format, outliers=True)
    _check(build(case), str(case))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("latent", [256, 512])
def test_absorbed_mla_of_several_positions(latent: int, mask: str) -> None:
    case = replace(_MLA, dtype=mx.float16, key_dim=latent, value_dim=latent, mask=mask, sinks=True)
    case = replace(case, batch=2, group=20, length=7, count=777, capacity=800)
    _check(build(case), str(case))


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_magnitudes_of_a_latent(dtype: mx.Dtype, size: float) -> None:
    """Of very different size by key; the scale undoes the size in the scores."""
    mx.random.seed(11)
    latent = size * mx.random.normal((1, 1, 3000, 512)) * mx.exp(mx.random.normal((1, 1, 3000, 1)))
    tensor = quantize(latent.astype(dtype), Format.affine(8))
    queries, rope = (mx.random.normal((1, 64, n, d)).astype(dtype) for n, d in ((1, 512), (1, 64)))
    rope_keys = mx.random.normal((1, 1, 3000, 64)).astype(dtype)
    call = check_call(queries, tensor, tensor, scale=0.01 / size, rope=RopeTerm(0.1 * rope, rope_keys))
    _check(call, f"{dtype} latent of size {size}")


def test_latents_that_do_not_follow_each_other() -> None:
    """Odd offsets and strides, which no wide load covers."""
    mx.random.seed(12)
    whole = quantize(mx.random.normal((2, 300, 3, 256)).astype(mx.float16), Format.affine(4, 32))
    tensor = _rebuilt(whole, lambda part: mx.swapaxes(part, 1, 2)[:, 1:2, 1:299])
    rope_keys = mx.random.normal((2, 300, 1, 65)).astype(mx.float16)
    rope_keys = mx.swapaxes(rope_keys, 1, 2)[:, :, 1:299, 1:]
    queries, rope = (mx.swapaxes(mx.random.normal((2, 1, 40, d)).astype(mx.float16), 1, 2) for d in (256, 64))
    _check(check_call(queries, tensor, tensor, scale=0.06, rope=RopeTerm(0.1 * rope, rope_keys)), "transposed latent")


@pytest.mark.parametrize("format", [Format.affine(4), Format.affine(8), Format.named("mxfp4")], ids=str)
def test_queries_of_absorbed_mla_that_do_not_follow_each_other(format: Format) -> None:
    """Rows at odd addresses, and elements of a row apart."""
    mx.random.seed(13)
    latent = quantize(mx.random.normal((2, 1, 300, 256)).astype(mx.float16), format)
    rope_keys = mx.random.normal((2, 1, 300, 64)).astype(mx.float16)
    odd = [(x * mx.random.normal((2, 40, 2, d + 1))).astype(mx.float16)[..., 1:] for x, d in ((1, 256), (0.1, 64))]
    apart = [(x * mx.random.normal((2, 40, d, 2))).astype(mx.float16).swapaxes(2, 3) for x, d in ((1, 256), (0.1, 64))]
    for queries, rope in (odd, apart):
        mx.eval(queries, rope)
        call = check_call(queries, latent, latent, scale=0.06, mask="causal", rope=RopeTerm(rope, rope_keys))
        _check(call, "slices of queries")


@pytest.mark.parametrize("scale", [0.0, -0.05, 0.5])
def test_scales_out_of_the_ordinary_with_a_rope_term(scale: float) -> None:
    """The kernel rounds latents to halves. At 0.5, where scores reach 48, that alone makes an error of 1.2e-3."""
    call = build(replace(_MLA, dtype=mx.float16, count=500))
    _check(replace(call, scale=scale), f"scale {scale}")


_PREFILL = Case(
    seed=1, batch=2, kv_heads=2, group=4, length=100, count=333, capacity=400, key_dim=256, value_dim=256, mask="causal"
)


@pytest.mark.parametrize(("format", "dtype"), _FORMATS_AND_DTYPES, ids=str)
def test_many_query_rows_of_every_format(format: Format, dtype: mx.Dtype) -> None:
    case = replace(_PREFILL, dtype=dtype, key_format=format, value_format=format, outliers=True)
    _check(build(case), str(case))


@pytest.mark.parametrize("seed", range(30))
def test_random_calls_of_many_query_rows(seed: int) -> None:
    case = random_prefill_case(seed)
    _check(build(case), str(case))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(512, 512), (192, 128), (160, 288), (96, 480), (480, 32)])
def test_many_query_rows_of_other_dimensions(key_dim: int, value_dim: int) -> None:
    """Rows that end amid a panel of 64 columns, and outputs too wide for one warpgroup."""
    case = replace(_PREFILL, key_dim=key_dim, value_dim=value_dim, key_format=Format.affine(4, 32), dtype=mx.float16)
    case = replace(case, value_format=case.key_format, group=3)
    _check(build(case), str(case))


def test_prompts_take_no_memory_for_scores() -> None:
    case = replace(_PREFILL, batch=1, group=8, length=512, count=8192, capacity=8192, dtype=mx.float16)
    call = build(case)
    mx.eval(backend.attend(call))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(backend.attend(call))
    assert mx.get_peak_memory() - before < 2 * call.queries.nbytes


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("group", "length", "count"), [(1, 17, 17), (3, 257, 300), (8, 40, 2000)])
def test_many_query_rows_with_masks_and_sinks(group: int, length: int, count: int, mask: str) -> None:
    case = replace(_PREFILL, dtype=mx.float16, mask=mask, sinks=True)
    case = replace(case, group=group, length=length, count=count, capacity=count + 5)
    _check(build(case), str(case))


def test_many_query_rows_over_rows_that_do_not_follow_each_other() -> None:
    """Queries, keys and values laid out [B, N, H, D], at odd offsets."""
    mx.random.seed(13)
    whole = quantize(mx.random.normal((2, 301, 3, 256)).astype(mx.float16), Format.affine(4))
    tensor = _rebuilt(whole, lambda part: mx.swapaxes(part, 1, 2)[:, :, 1:300])
    queries = mx.swapaxes(mx.random.normal((2, 50, 6, 257)).astype(mx.float16), 1, 2)[..., 1:]
    _check(check_call(queries, tensor, tensor, scale=0.06, mask="causal"), "transposed")


def _in_double_precision(call: AttentionCall) -> mx.array:
    """Attention without a mask, for one KV head. Sums over a million keys are too much for float32's rounding."""
    with mx.stream(mx.cpu):
        queries, keys, values = (
            x.astype(mx.float32).astype(mx.float64)
            for x in (call.queries, call.keys.dequantize(mx.float32), call.values.dequantize(mx.float32))
        )
        weights = mx.softmax((queries * call.scale) @ mx.swapaxes(keys, -1, -2), axis=-1)
        out = (weights @ values).astype(mx.float32)
        mx.eval(out)
    return out


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("count", [33, 8191, 1 << 20])
def test_long_contexts(count: int, dtype: mx.Dtype) -> None:
    """Values with a mean, so that a sum over many of them is no small difference of large numbers."""
    mx.random.seed(1)
    queries = mx.random.normal((1, 4, 1, 64)).astype(dtype)
    keys, values = (mx.random.normal((1, 1, count, 64)) + mean for mean in (0, 1))
    packed = [quantize(x.astype(dtype), Format.affine(4)) for x in (keys, values)]
    call = check_call(queries, *packed, scale=0.125)
    taken, reason = backend.has_fused_kernel(call.signature)
    assert taken, reason
    error = relative_error(backend.attend(call), _in_double_precision(call))
    assert error <= TOLERANCES[dtype], f"error {error:.2g} with {count} keys"


@pytest.mark.parametrize("batch", [17, 200])
def test_many_sequences(batch: int) -> None:
    case = Case(seed=2, batch=batch, kv_heads=2, group=4, count=300, capacity=512, dtype=mx.float16, mask="padding")
    _check(build(case), str(case))


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("format", [Format.affine(4), Format.affine(8), Format.named("mxfp8")], ids=str)
def test_magnitudes_of_values_far_from_one(format: Format, dtype: mx.Dtype, size: float) -> None:
    mx.random.seed(3)
    queries, keys, values = (mx.random.normal((1, 2, n, 128)) for n in (1, 777, 777))
    values = values * size * mx.exp(3 * mx.random.normal((1, 2, 777, 1)))  # of very different size by key
    packed = [quantize(x.astype(dtype), format) for x in (keys, mx.clip(values, -6e4, 6e4))]
    _check(check_call(queries.astype(dtype), *packed, scale=0.1), f"{format} {dtype} values of size {size}")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("format", [*map(Format.affine, (2, 4, 6)), Format.named("mxfp8")], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(seed=9, group=4, count=500, capacity=512, mask="additive"),
        Case(seed=9, group=4, length=4, count=70, capacity=80, key_dim=128, value_dim=128, mask="causal", sinks=True),
        Case(seed=9, group=4, length=7, count=700, capacity=720, key_dim=128, value_dim=256, mask="additive"),
        Case(seed=9, group=4, length=40, count=200, capacity=256, key_dim=256, value_dim=256, mask="causal"),
        Case(seed=9, kv_heads=1, group=64, count=200, capacity=256, key_dim=512, value_dim=512, rope_dim=64),
    ],
    ids=["one position", "four positions", "seven positions", "a prompt", "absorbed MLA"],
)
def test_queries_that_are_not_finite(case: Case, format: Format, dtype: mx.Dtype) -> None:
    call = build(replace(case, key_format=format, value_format=format, dtype=dtype))
    taken, reason = backend.has_fused_kernel(call.signature)
    if not taken:
        pytest.skip(reason)
    check_queries_that_are_not_finite(backend.attend, call)


def test_rows_that_do_not_follow_each_other() -> None:
    """Caches laid out [B, N, H, D] and odd offsets: strides and alignment that no fast path covers."""
    mx.random.seed(4)
    x = mx.random.normal((2, 301, 3, 64)).astype(mx.float16)
    for format, length in product(
        (Format.affine(4), Format.affine(3, 32), Format.affine(8), Format.named("nvfp4")), (2, 12)
    ):
        whole = quantize(x, format)
        tensor = _rebuilt(whole, lambda part: mx.swapaxes(part, 1, 2)[:, :, 1:300])
        queries = mx.swapaxes(mx.random.normal((2, length, 6, 64)).astype(mx.float16), 1, 2)
        _check(check_call(queries, tensor, tensor, scale=0.125, mask="causal"), f"{format} transposed")


@pytest.mark.parametrize("lowest", [-mx.inf, mx.finfo(mx.float32).min])
def test_masks_that_leave_a_row_nothing(lowest: float) -> None:
    """``-inf`` everywhere gives zeros; the lowest finite number everywhere gives the mean, as a softmax does."""
    case = Case(seed=5, group=3, count=70, capacity=70, dtype=mx.float32)
    call = build(case)
    mask = mx.where(mx.arange(6)[None, :, None, None] == 2, lowest, mx.zeros((1, 6, 1, 70)))
    _check(
        check_call(call.queries, call.keys, call.values, scale=call.scale, mask=mask),
        f"a row masked with {lowest}",
    )


def test_the_context_grows_without_new_kernels_and_calls_may_overlap() -> None:
    case = Case(seed=6, group=4, count=700, capacity=700, dtype=mx.float16)
    call = build(case)
    backend.has_fused_kernel(call.signature)
    calls = []
    for count in range(600, 700, 7):
        keys, values = (_rebuilt(x, partial(_first_keys, count)) for x in (call.keys, call.values))
        calls.append(check_call(call.queries, keys, values, scale=call.scale))
    assert len({c.signature for c in calls}) == 1
    results = [backend.attend(c) for c in calls]
    mx.eval(results)  # independent launches, free to run at once
    for result, one in zip(results, calls, strict=True):
        assert relative_error(result, expected(one)) <= TOLERANCES[mx.float16]


def test_results_do_not_change_between_runs() -> None:
    call = build(replace(random_case(7), count=700, capacity=900, mask="none", dtype=mx.bfloat16))
    first, second = backend.attend(call), backend.attend(call)
    assert mx.array_equal(first, second).item()


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, mx.float32) for name in FLOAT_FORMATS), ("nvfp4", mx.float16)], ids=str
)
def test_every_code_of_the_floating_point_formats(name: str, dtype: mx.Dtype) -> None:
    """Values made of all codes, with scales from small to large."""
    format = Format.named(name)
    words = mx.random.randint(0, 1 << 31, (1, 1, 256, format.words(64)), key=mx.random.key(8)).astype(mx.uint32)
    if name == "mxfp8":  # 0x7f and 0xff stand for no number
        words = mx.bitwise_and(words, 0xF7F7F7F7)
    low, high = (110, 140) if name != "nvfp4" else (0, 126)
    scales = mx.random.randint(low, high, (1, 1, 256, format.groups(64)), key=mx.random.key(9)).astype(mx.uint8)
    tensor = QuantizedTensor(words, scales, None, format, dtype=dtype)
    queries = mx.random.normal((1, 1, 1, 64), key=mx.random.key(10)).astype(dtype)
    _check(check_call(queries, tensor, tensor, scale=1e-6), f"all codes of {name}")


@pytest.mark.parametrize("format", [Format.affine(4), Format.affine(8, symmetric=True), Format.named("mxfp4")], ids=str)
@pytest.mark.parametrize("capacity", [500, 640])
def test_keys_and_values_in_one_stack(format: Format, capacity: int) -> None:
    """As caches store them: all heads of keys, then all of values, the first positions of a larger buffer."""
    mx.random.seed(11)
    sides = [quantize(mx.random.normal((2, 3, capacity, 128)).astype(mx.float16), format) for _ in range(2)]
    codes, scales = (part[:, :, :491] for part in stack_parts([x.parts for x in sides]))
    stack = PackedStack(codes, scales, 2, format, dim=128, dtype=mx.float16)
    queries = mx.random.normal((2, 12, 3, 128)).astype(mx.float16)
    call = check_call(queries, *stack.tensors(), scale=0.1, mask="causal")
    assert call.stack is stack
    _check(call, f"a stack of {format}")


@pytest.mark.parametrize("shared", [99, 64, 48])
@pytest.mark.parametrize(
    "case",
    [
        Case(seed=12, group=4, count=3000, capacity=3072, key_dim=128, value_dim=128, dtype=mx.float16),
        Case(
            seed=13, group=4, count=3000, capacity=3000, key_dim=256, value_dim=256, dtype=mx.bfloat16,
            key_format=Format.affine(8), value_format=Format.affine(8),
        ),
        Case(
            seed=14, group=3, length=4, count=333, capacity=400, key_dim=128, value_dim=128, dtype=mx.float32,
            mask="causal", key_format=Format.affine(3), value_format=Format.named("nvfp4"),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_plans_for_devices_with_less_shared_memory(case: Case, shared: int) -> None:
    limits = device_limits()
    assert limits is not None
    call = build(case)
    plan = decode_plan(call.signature, replace(limits, shared_per_block=shared * 1024))
    if limits.shared_per_block >= HOPPER.shared_per_block:
        assert (plan.warps, plan.stages, plan.parts) != _layout(call, HOPPER)
    error = relative_error(DecodeKernel(plan)(call), expected(call))
    assert error <= TOLERANCES[case.dtype], f"error {error:.2g} with {shared} KiB in {case}"


def _layout(call: AttentionCall, limits: DeviceLimits) -> tuple[int, int, int]:
    plan = decode_plan(call.signature, limits)
    return plan.warps, plan.stages, plan.parts


_MANY_SPLITS = Case(
    seed=16, kv_heads=1, group=8, length=3, count=40000, capacity=40064, key_dim=256, value_dim=256, dtype=mx.float16,
    mask="causal", sinks=True,
)  # fmt: skip


@pytest.mark.parametrize("at_once", [HOPPER.multiprocessors, 1], ids=["by all blocks", "by the last block"])
@pytest.mark.parametrize("kind", [decode_plan, wide_plan])
def test_results_of_any_number_of_splits_are_merged(
    kind: Callable[[Signature, DeviceLimits], DecodePlan | WidePlan], at_once: int
) -> None:
    """Numbers that divide the output evenly or not; with more than a few, each block merges a slice."""
    limits = device_limits()
    assert limits is not None
    call = build(_MANY_SPLITS)
    try:
        plan = kind(call.signature, limits)
    except Unsupported as reason:
        pytest.skip(str(reason))
    reference = expected(call)
    for splits in (2, 3, 7, 16, 17, 33, 66):
        tried = replace(plan, ideal_splits=splits, blocks_at_once=at_once)
        assert tried.splits(call.key_count) == splits
        error = relative_error(DecodeKernel(tried)(call), reference)
        assert error <= TOLERANCES[mx.float16], f"error {error:.2g} with {splits} splits"


@pytest.mark.parametrize("fewest", [1, 3, 4, 16])
@pytest.mark.parametrize("group", [3, 8, 20])
def test_teams_without_keys(monkeypatch: pytest.MonkeyPatch, group: int, fewest: int) -> None:
    """Few keys: warps that have none leave, if they have no query rows either."""
    monkeypatch.setattr("qsdpa_patch.kernels.cuda.decode_plan._FEWEST_TEAMS", fewest)
    case = Case(seed=23, kv_heads=2, group=group, count=1, capacity=1, key_dim=128, value_dim=128, dtype=mx.float16)
    for count in (1, 33, 100, 257, 1000, 1025, 2047, 4100):
        tried = replace(case, count=count, capacity=count)
        _check(build(tried), f"{tried}, {fewest} teams")


def test_no_block_waits_for_ever_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks wait for each other than the device holds: the last of each tile merges what the first left."""
    call = build(replace(_MANY_SPLITS, kv_heads=6))
    limits = device_limits()
    assert limits is not None
    plan = replace(decode_plan(call.signature, limits), ideal_splits=100, blocks_at_once=1 << 20)
    assert 6 * plan.row_tiles * plan.splits(call.key_count) > 2 * limits.multiprocessors
    counters = mx.zeros((256,), dtype=mx.uint32)
    mx.eval(counters)
    monkeypatch.setattr(decode, "take_tickets", lambda _: counters)
    reference = expected(call)
    for _ in range(3):
        result = DecodeKernel(plan)(call)
        assert relative_error(result, reference) <= TOLERANCES[mx.float16]
        assert not mx.any(counters).item()  # left as they were found


def test_counters_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "_ARRAYS", 256)
    monkeypatch.setattr(tickets, "_thread", tickets._Thread())
    call = build(Case(seed=15, group=4, count=5000, capacity=5000, key_dim=128, value_dim=128, dtype=mx.float16))
    taken, reason = backend.has_fused_kernel(call.signature)
    assert taken, reason
    for _ in range(3):  # of 250 that are evaluated together no two share counters; the third time round all are used
        results = [backend.attend(call) for _ in range(250)]
        mx.eval(results)
        assert all(mx.array_equal(result, results[0]).item() for result in results)
        assert relative_error(results[0], expected(call)) <= TOLERANCES[mx.float16]


@pytest.mark.parametrize("length", [1, 40])
def test_sinks_that_do_not_follow_each_other(length: int) -> None:
    case = Case(seed=5, kv_heads=2, group=4, length=length, count=90, capacity=90, key_dim=256, value_dim=256)
    call = build(replace(case, dtype=mx.float16, mask="causal", sinks=True))
    assert call.sinks is not None
    pairs = mx.stack([call.sinks, 100 + call.sinks], axis=1)
    mx.eval(pairs)
    _check(replace(call, sinks=pairs[:, 0]), "every other sink")
