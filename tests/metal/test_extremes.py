"""The corners of what the Metal kernels take, which random calls seldom reach."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.attention_call import check_call
from qsdpa_patch.kernels.format import FLOAT_FORMATS, Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor
from tests import attention_cases as cases
from tests.attention_cases import Case
from tests.metal.emulated_backend import EmulatedBackend

WIDE, NARROW = Format.affine(4, 64), Format.affine(3, 32)
CORNERS = {
    "64 heads to a key head": Case(seed=1, kv_heads=1, group=64, count=70, capacity=80, key_dim=128, value_dim=128),
    "64 heads and 16 positions": Case(seed=2, kv_heads=1, group=64, length=16, count=33, capacity=33, mask="causal"),
    "the longest rows": Case(seed=3, group=6, length=2, count=40, capacity=41, key_dim=512, value_dim=512),
    "short keys, long values": Case(
        seed=4, group=2, count=40, capacity=40, key_dim=32, value_dim=512, key_format=NARROW
    ),
    "long keys, short values": Case(
        seed=5, group=9, count=40, capacity=40, key_dim=512, value_dim=32, value_format=NARROW
    ),
    "a value chunk for each of 7 simdgroups": Case(seed=6, group=20, count=40, capacity=44, key_dim=64, value_dim=448),
    "as many keys as positions": Case(seed=7, group=1, length=16, count=16, capacity=16, mask="causal"),
    "a latent, three positions": Case(
        seed=14,
        kv_heads=1,
        group=20,
        length=3,
        count=70,
        capacity=75,
        key_dim=256,
        value_dim=256,
        rope_dim=64,
        mask="causal",
        sinks=True,
    ),
    "one key": Case(seed=8, group=4, count=1, capacity=1, sinks=True),
}


def check(metal: EmulatedBackend, case: Case, keys_per_split: int = 256) -> None:
    call = cases.build(case)
    error = cases.relative_error(metal.attend(call, keys_per_split), cases.expected(call))
    assert error <= cases.TOLERANCES[case.dtype], f"error {error:.1e}: {case}"


@pytest.mark.parametrize("name", CORNERS)
def test_a_corner(metal: EmulatedBackend, name: str) -> None:
    for dtype in (mx.float32, mx.bfloat16):
        check(metal, replace(CORNERS[name], dtype=dtype))


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("name", [*FLOAT_FORMATS, "symmetric"])
def test_every_format_without_biases(metal: EmulatedBackend, name: str, group: int) -> None:
    fmt = Format.affine(8, 64, symmetric=True) if name == "symmetric" else Format.named(name)
    check(metal, Case(seed=9, group=group, count=50, capacity=60, key_format=fmt, value_format=WIDE))
    check(metal, Case(seed=9, group=group, count=50, capacity=60, key_format=WIDE, value_format=fmt))


@pytest.mark.parametrize("group", [3, 8, 40])
def test_more_splits_than_tiles_of_keys(metal: EmulatedBackend, group: int) -> None:
    check(
        metal, Case(seed=10, kv_heads=1, group=group, count=65, capacity=65, sinks=True, mask="bool"), keys_per_split=1
    )


@pytest.mark.parametrize("group", [2, 20])
@pytest.mark.parametrize("dim", [64, 256])
def test_keys_that_are_the_values(metal: EmulatedBackend, group: int, dim: int) -> None:
    apart = cases.build(Case(seed=15, group=group, count=70, capacity=80, key_dim=dim, value_dim=dim, sinks=True))
    call = check_call(apart.queries, apart.keys, apart.keys, scale=apart.scale, sinks=apart.sinks)
    for keys_per_split in (32, 256):
        assert cases.relative_error(metal.attend(call, keys_per_split), cases.expected(call)) <= 1e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
@pytest.mark.parametrize("group", [2, 9])
def test_queries_that_are_not_finite(metal: EmulatedBackend, group: int, dtype: mx.Dtype) -> None:
    call = cases.build(Case(seed=16, group=group, length=2, count=70, capacity=80, dtype=dtype, mask="additive"))
    cases.check_queries_that_are_not_finite(metal.attend, call)


@pytest.mark.parametrize("rows", ["few", "many", "latent"])
def test_scores_that_later_keys_exceed_by_far(metal: EmulatedBackend, rows: str) -> None:
    """What is summed so far has to be made relative to a higher score, more than once."""
    case = {
        "few": Case(seed=12, group=3, count=300, capacity=300),
        "many": Case(seed=12, group=9, count=200, capacity=200),
        "latent": Case(seed=12, kv_heads=1, group=16, count=200, capacity=200, key_dim=256, value_dim=256, rope_dim=64),
    }[rows]
    for dtype in (mx.float32, mx.float16):
        call = cases.build(replace(case, dtype=dtype))
        call = replace(call, scale=8 * call.scale)
        assert cases.relative_error(metal.attend(call), cases.expected(call)) <= cases.TOLERANCES[dtype]


@pytest.mark.parametrize("group", [2, 6, 20])
def test_keys_stored_apart(metal: EmulatedBackend, group: int) -> None:
    """Buffers of ``[B, N, H, D]``, in which the rows of a head are not neighbours."""
    call = cases.build(Case(seed=13, batch=2, group=group, count=70, capacity=70, value_dim=256))

    def apart(tensor: QuantizedTensor) -> QuantizedTensor:
        return tensor.map_parts(lambda part: mx.contiguous(part.swapaxes(1, 2)).swapaxes(1, 2))

    stored = replace(call, keys=apart(call.keys), values=apart(call.values))
    assert mx.array_equal(metal.attend(stored), metal.attend(call))
    assert mx.array_equal(metal.attend(stored, keys_per_split=32), metal.attend(call, keys_per_split=32))


def test_outputs_do_not_depend_on_what_lies_beside_the_keys(metal: EmulatedBackend) -> None:
    """The rest of a cache's buffer may hold anything, infinities and NaN included."""
    call = cases.build(Case(seed=11, group=5, count=50, capacity=60, dtype=mx.float16))
    codes, scales, biases = call.keys.parts
    parts = []
    for part, value in ((scales, float("nan")), (biases, float("inf"))):
        whole = mx.full((1, 2, 60, part.shape[-1]), value, part.dtype)
        whole[:, :, :50] = part
        parts.append(whole[:, :, :50])
    keys = QuantizedTensor(codes, parts[0], parts[1], call.keys.format, dtype=mx.float16)
    assert mx.array_equal(metal.attend(replace(call, keys=keys)), metal.attend(call))
