"""The Metal kernel that quantizes new rows gives the bits of MLX's own kernels.

On Linux both run in the emulator; on a Mac, ours is held against ``mx.quantize`` on the GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

from qsdpa_patch.kernels import row_quantization
from qsdpa_patch.kernels.format import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_FORMATS, Format
from qsdpa_patch.kernels.metal import backend
from qsdpa_patch.kernels.quantized_tensor import quantize_parts, stack_parts
from qsdpa_patch.kernels.row_kernel import Rows
from qsdpa_patch.kernels.row_quantization import has_row_kernel, quantize_rows
from tests.metal.broken_kernels import failing_kernels, wrong_kernels
from tests.metal.emulated_backend import emulated_row_quantization
from tests.metal.emulator import Cost, missing_tools

FORMATS = [
    *(Format.affine(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES),
    *map(Format.named, FLOAT_FORMATS),
]
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
CASES = [(format, DTYPES[i % 3]) for i, format in enumerate(FORMATS)]
CASES += [(format, dtype) for format in FORMATS[8::5] for dtype in DTYPES if (format, dtype) not in CASES]


@pytest.fixture
def costs() -> Iterator[list[Cost]]:
    """What the launches of the kernel cost."""
    if not mx.metal.is_available() and missing_tools():
        pytest.skip(missing_tools())
    with emulated_row_quantization() as launches:
        yield launches


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)


def assert_bits_of_mlx(sides: list[mx.array], format: Format) -> None:
    """The kernel takes the sides, and gives what MLX's own kernels do, the signs of zeros included."""
    rows = Rows(format, sides[0].dtype, sides[0].shape[-1], len(sides))
    assert has_row_kernel("metal", rows) == (True, "")
    actual, wanted = quantize_rows(sides, format), row_quantization.quantize_rows_in_ops(sides, format)
    for a, w in zip(actual, wanted, strict=True):
        assert (a.shape, a.dtype) == (w.shape, w.dtype)
        assert mx.array_equal(a.view(mx.uint8), w.view(mx.uint8))


@pytest.mark.parametrize(("format", "dtype"), CASES, ids=str)
def test_every_format(costs: list[Cost], format: Format, dtype: mx.Dtype) -> None:
    x = normal(2, 4, 5, 256)
    spread = mx.exp(4 * normal(2, 4, 5, 1))
    sides = [(x * spread)[:, :3], mx.round(3 * x) / 4]
    assert_bits_of_mlx([side.astype(dtype) for side in sides], format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [Format.affine(4), *map(Format.named, FLOAT_FORMATS)], ids=str)
def test_numbers_at_the_ends_of_their_range(costs: list[Cost], format: Format, dtype: mx.Dtype) -> None:
    """Zeros of both signs, denormal numbers, the largest ones, infinities, and numbers halfway between two codes."""
    limits = mx.finfo(dtype)
    x = normal(1, 1, 1, 64)
    rows = [
        0 * x, -mx.abs(x), mx.abs(x) + 5, mx.full(x.shape, -3.25), mx.where(x > 1, x, -0.0), mx.where(x > 1, mx.inf, x),
        mx.where(x > 1, -mx.inf, x), mx.arange(64) / 8 - 4, mx.arange(64) / 16, mx.clip(x, -1, 1) * limits.max,
        x * limits.smallest_normal, x * limits.smallest_normal / 64, x * limits.smallest_normal * 448,
    ]  # fmt: skip
    assert_bits_of_mlx([mx.concatenate([row.reshape(1, 1, 1, 64) for row in rows], axis=2).astype(dtype)], format)


@pytest.mark.parametrize("format", [Format.affine(4), Format.affine(3, 32), Format.named("nvfp4")], ids=str)
def test_sides_of_any_layout(costs: list[Cost], format: Format) -> None:
    keys = normal(2, 7, 8, 64, dtype=mx.float16)[:, :, :3].swapaxes(1, 2)  # [B, L, H, D], as a projection gives it
    values = normal(2, 3, 64, 9, dtype=mx.float16).swapaxes(2, 3)[:, :, 1:8]  # numbers of a row lie apart
    assert_bits_of_mlx([keys, values], format)
    assert_bits_of_mlx([mx.broadcast_to(keys[:, :1], (2, 5, 7, 64))], format)


@pytest.mark.parametrize(("dim", "bits"), [(72, 4), (80, 5), (32, 8)])
def test_rows_that_are_padded(costs: list[Cost], dim: int, bits: int) -> None:
    format, _ = Format.affine(bits).fit(dim)
    assert_bits_of_mlx([normal(1, 2, 3, dim), normal(1, 1, 3, dim)], format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_rows_that_the_kernel_rotates(costs: list[Cost], dim: int, dtype: mx.Dtype) -> None:
    format = Format.affine(4, 32, rotated=True)
    assert_bits_of_mlx([normal(1, 2, 3, dim, dtype=dtype), normal(1, 3, 3, dim, dtype=dtype)], format)
    before = len(costs)
    quantize_rows([normal(1, 2, 3, dim, dtype=dtype), normal(1, 3, 3, dim, dtype=dtype)], format)
    assert mx.metal.is_available() or len(costs) == before + 1


@pytest.mark.parametrize("dim", [72, 512])
def test_rows_that_are_rotated_before(costs: list[Cost], dim: int) -> None:
    """Padded ones, and ones longer than a SIMD-group's threads hold."""
    format, _ = Format.affine(4, rotated=True).fit(dim)
    sides = [normal(1, 2, 3, dim), normal(1, 2, 3, dim) + 1]
    actual = quantize_rows(sides, format)
    wanted = stack_parts([quantize_parts(x, format) for x in sides])  # on the CPU, which in float32 rounds alike
    assert all(map(mx.array_equal, actual, wanted))
    assert mx.metal.is_available() or len(costs) == 2  # the check at first use, and this


@pytest.mark.parametrize("heads", [(1,), (2, 0), (2, 1)])
def test_sides_of_few_numbers_take_no_kernel(costs: list[Cost], heads: tuple[int, ...]) -> None:
    """MLX hands fewer than 8 numbers to a kernel in another address space, for which it would not compile."""
    format, _ = Format.affine(4).fit(7)
    sides = [normal(1, n, 1, 7) for n in heads]
    wanted = row_quantization.quantize_rows_in_ops(sides, format)
    before = len(costs)
    assert all(map(mx.array_equal, quantize_rows(sides, format), wanted))
    assert len(costs) == before


@pytest.mark.skipif(mx.metal.is_available(), reason="counts are the emulator's")
@pytest.mark.parametrize("count", [1, 37])
def test_one_launch_that_reads_and_writes_each_byte_once(costs: list[Cost], count: int) -> None:
    keys, values = normal(2, 3, count, 128, dtype=mx.float16), normal(2, 3, count, 128, dtype=mx.float16)
    quantize_rows([keys, values], Format.affine(5))
    before = len(costs)
    codes, scales = quantize_rows([keys, values], Format.affine(5))
    (cost,) = costs[before:]
    for name in ("keys", "values"):
        assert cost.buffers[name].load_bytes == cost.buffers[name].unique_bytes == keys.nbytes
    assert cost.buffers["codes"].store_bytes == codes.nbytes
    assert cost.buffers["scales"].store_bytes == scales.nbytes


def _refused_kernels(**options: Any) -> Callable[..., list[mx.array]]:
    def call(**launch: Any) -> list[mx.array]:
        raise ValueError("Thread group size (128) is greater than the maximum allowed threads per threadgroup")

    return call


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        (wrong_kernels, "bytes differ"),
        (failing_kernels, "Unable to build metal library"),
        (_refused_kernels, "maximum allowed threads"),
    ],
)
def test_a_kernel_that_is_wrong_or_does_not_compile_is_logged_once_and_not_used(
    costs: list[Cost],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kernels: Callable[..., Any],
    reason: str,
) -> None:
    monkeypatch.setattr(backend, "metal_kernel", kernels)
    sides, format = [normal(1, 2, 3, 64)] * 2, Format.affine(4)
    wanted = row_quantization.quantize_rows_in_ops(sides, format)
    with caplog.at_level(logging.WARNING, "qsdpa_patch"):
        for _ in range(2):
            assert all(map(mx.array_equal, quantize_rows(sides, format), wanted))
    assert len(caplog.records) == 1
    assert reason in caplog.text
