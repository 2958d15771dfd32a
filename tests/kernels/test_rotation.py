"""Rotation: of rows, of quantized tensors, and of attention over them on every route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest

from qsdpa_patch.kernels import dequantized_sdpa, reference, tiled_attention
from qsdpa_patch.kernels.attention_call import AttentionCall, check_call
from qsdpa_patch.kernels.backends import load_backend
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, dequantize_parts, quantize
from qsdpa_patch.kernels.rotation import block_size, rotate
from tests import attention_cases as cases

DIMS = (8, 16, 24, 32, 64, 72, 80, 96, 100, 112, 128, 192, 256, 512, 576)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
ROUNDING = {mx.float16: 2e-3, mx.bfloat16: 2e-2, mx.float32: 1e-6}


def hadamard(dim: int) -> mx.array:
    """The orthonormal matrix ``[dim, dim]`` of Sylvester's construction, in equal blocks on the diagonal."""
    block = dim & -dim
    index = mx.arange(dim)
    within = index % block
    common = within[:, None] & within[None]
    odd_bits = sum((common >> bit) & 1 for bit in range(block.bit_length())) % 2
    matrix = mx.where(odd_bits == 1, -1.0, 1.0) / block**0.5
    return mx.where(index[:, None] // block == index[None] // block, matrix, 0.0)


def rows(*shape: int, seed: int = 0) -> mx.array:
    """Normal rows with a channel that stands out, as keys have."""
    x = mx.random.normal(shape, key=mx.random.key(seed))
    x[..., shape[-1] // 3] *= 20
    return x


def largest_error(actual: mx.array, wanted: mx.array) -> float:
    return cases.relative_error(actual, wanted.astype(mx.float32))


@pytest.mark.parametrize("dim", DIMS)
def test_a_rotation_is_the_hadamard_matrix_in_blocks(dim: int) -> None:
    matrix = hadamard(dim)
    assert largest_error(matrix @ matrix, mx.eye(dim)) <= 1e-6
    x = rows(2, 3, 5, dim)
    assert largest_error(rotate(x), x @ matrix) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_rotating_twice_changes_nothing(dim: int, dtype: mx.Dtype) -> None:
    x = rows(2, 2, 7, dim).astype(dtype)
    assert rotate(x).dtype == dtype
    assert largest_error(rotate(rotate(x)), x) <= ROUNDING[dtype]


@pytest.mark.parametrize("shape", [(1, 2, 0, 64), (1, 2, 3, 7)])
def test_there_may_be_nothing_to_rotate(shape: tuple[int, ...]) -> None:
    x = mx.random.normal(shape)
    assert mx.array_equal(rotate(x), x)


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 100, 128])
@pytest.mark.parametrize("format", [Format.affine(4), Format.affine(8, 32), Format.named("nvfp4")], ids=str)
def test_a_rotated_tensor_reads_as_the_rows_it_was_made_of(format: Format, dim: int) -> None:
    x = rows(2, 2, 9, dim)
    rotated = replace(format, rotated=True)
    tensor = quantize(x, rotated)
    assert tuple(tensor.shape) == (2, 2, 9, dim)
    assert tensor.format == rotated.fit(dim)[0]
    plain = quantize(rotate(x), format) if tensor.format.rotated else quantize(x, format)
    for part, wanted in zip(tensor.parts, plain.parts, strict=True):
        assert mx.array_equal(part, wanted)
    expected = rotate(plain.dequantize()) if tensor.format.rotated else plain.dequantize()
    assert mx.array_equal(mx.array(tensor), expected)
    assert mx.array_equal(tensor.dequantize(), expected)
    stored = dequantize_parts(tensor.codes, tensor.scales, tensor.biases, tensor.format)
    assert mx.array_equal(tensor.dequantize(stored=True), stored)


def test_only_lengths_with_a_power_of_two_are_rotated() -> None:
    for dim in range(1, 600):
        format, _ = Format.affine(4, rotated=True).fit(dim)
        assert format.rotated == (dim % 8 == 0)
        assert format.packing == Format.affine(4).fit(dim)[0]
        assert dim % block_size(dim) == 0


def test_a_slice_of_a_rotated_tensor_is_rotated() -> None:
    x = rows(1, 2, 20, 80)
    tensor = quantize(x, Format.affine(4, rotated=True))
    part = tensor.map_parts(lambda p: p[:, :, 5:12])
    assert part.format == tensor.format
    assert mx.array_equal(mx.array(part), mx.array(tensor)[:, :, 5:12])


def test_a_channel_that_stands_out_costs_less_when_rotated() -> None:
    x = rows(1, 4, 200, 128)
    errors = {}
    for rotated in (False, True):
        error = quantize(x, Format.affine(4, rotated=rotated)).dequantize() - x
        errors[rotated] = float((error**2).mean())
    assert errors[True] < 0.5 * errors[False]


def rotated_case(case: cases.Case, sides: str) -> cases.Case:
    return replace(
        case,
        key_format=replace(case.key_format, rotated="k" in sides),
        value_format=replace(case.value_format, rotated="v" in sides or (case.is_mla and "k" in sides)),
    )


class _Plain:
    """Plain rows with as much of a QuantizedTensor as the reference asks for."""

    def __init__(self, rows: mx.array) -> None:
        self.rows, self.shape = rows, rows.shape

    def dequantize(self, dtype: mx.Dtype, *, stored: bool) -> mx.array:
        return self.rows.astype(dtype)


def attention_of_values(call: AttentionCall) -> mx.array:
    """The float32 reference over what keys and values read as; the queries are those of ``call``, rotated back."""
    queries = call.queries[..., : call.keys.dim].astype(mx.float32)
    queries = rotate(queries) if call.keys.format.rotated else queries
    keys, values = (x.dequantize(mx.float32) for x in (call.keys, call.values))
    sig = call.signature._replace(key_dim=call.keys.dim, value_dim=call.values.dim, dtype=mx.float32)
    exact = replace(call, queries=queries, keys=_Plain(keys), values=_Plain(values), signature=sig)  # type: ignore[arg-type]
    return reference.attend(exact)


def assert_right(call: AttentionCall, attend: Callable[[AttentionCall], mx.array], case: cases.Case) -> None:
    actual = call.finish(attend(call))
    tolerance = cases.TOLERANCES[case.dtype] * (1 if case.dtype == mx.float32 else 1.5)  # one more rounding
    assert actual.shape[-1] == call.values.dim
    assert actual.dtype == case.dtype
    assert largest_error(actual, attention_of_values(call)) <= tolerance, str(case)


SIDES = ("k", "v", "kv")


@pytest.mark.parametrize("seed", range(60))
def test_attention_in_ops_over_rotated_tensors(seed: int) -> None:
    case = rotated_case(cases.random_case(1000 + seed, max_count=300, max_length=40), SIDES[seed % 3])
    call = cases.build(case)
    assert_right(call, reference.attend, case)
    assert_right(call, lambda c: tiled_attention.attend(c, 100_000), case)


@pytest.mark.parametrize("seed", range(60))
def test_fused_attention_over_rotated_tensors(seed: int) -> None:
    backend = load_backend("cpu")
    available, reason = backend.is_available()
    if not available:
        pytest.skip(reason)
    case = rotated_case(cases.random_case(2000 + seed, max_count=300), SIDES[seed % 3])
    call = cases.build(case)
    assert backend.has_fused_kernel(call.signature) == (True, ""), str(case)
    assert_right(call, backend.attend, case)


@pytest.mark.parametrize("seed", range(10))
def test_latent_attention_over_a_rotated_latent(seed: int) -> None:
    case = rotated_case(cases.random_mla_case(seed, max_count=200), "k")
    call = cases.build(case)
    assert call.signature.shared_kv
    assert_right(call, lambda c: tiled_attention.attend(c, 1 << 28), case)
    backend = load_backend("cpu")
    if backend.is_available()[0]:
        assert_right(call, backend.attend, case)


@pytest.mark.parametrize("seed", range(12))
def test_prefill_over_rotated_tensors(seed: int) -> None:
    case = cases.random_case(3000 + seed, max_count=300)
    case = replace(case, length=33, count=333, capacity=400, key_dim=128, value_dim=128, mask="causal")
    case = replace(case, key_format=Format.affine(4), value_format=Format.affine(8))
    case = rotated_case(case, SIDES[seed % 3])
    call = cases.build(case)
    fused, reason = dequantized_sdpa.has_fused_sdpa(call.signature)
    if not fused:
        pytest.skip(reason)
    assert_right(call, lambda c: dequantized_sdpa.attend(c, 1 << 20), case)


@pytest.mark.parametrize("dim", [64, 72, 80, 100])
def test_queries_follow_the_keys(dim: int) -> None:
    queries = rows(1, 4, 3, dim)
    keys, values = (quantize(rows(1, 2, 9, dim, seed=s), Format.affine(4, 32, rotated=True)) for s in (1, 2))
    before = mx.array(queries)
    call = check_call(queries, keys, values, scale=1.0)
    wanted = rotate(queries) if keys.format.rotated else queries
    assert mx.array_equal(call.queries[..., :dim], wanted)
    assert not mx.any(call.queries[..., dim:]).item()
    assert mx.array_equal(queries, before)
    assert not call.signature.key_format.rotated
    assert not call.signature.value_format.rotated
    assert isinstance(call.keys, QuantizedTensor)
    assert call.finish(reference.attend(call)).shape[-1] == dim
