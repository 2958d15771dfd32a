"""Bounds on the counted work of the decode kernels. ``python -m tests.metal.cost_table`` prints all of it."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import pytest

from qsdpa_patch.caches import QuantizedKVCache
from qsdpa_patch.kernels.format import Format
from tests.metal import append_cost, cost_table
from tests.metal.emulator import missing_tools

pytestmark = [
    pytest.mark.skipif(mx.metal.is_available(), reason="a GPU does not count"),
    pytest.mark.skipif(bool(missing_tools()), reason=missing_tools() or "the emulator runs here"),
]
ROWS_OF_A_LATENT = {256: 64, 512: 32}
"""Heads that a threadgroup can take: their output fills its registers."""


@cache
def mlx_row(group: int, dim: int) -> cost_table.Row:
    return cost_table.measure_mlx(group, dim)


@pytest.mark.parametrize(("bits", "group", "dim"), cost_table.SHAPES)
def test_decode_reads_packed_bytes_once_and_does_less_than_mlx_does_for_float_keys(
    bits: int, group: int, dim: int
) -> None:
    ours = cost_table.measure(cost_table.decode_case(bits, group, dim))
    assert 1 <= ours.memory_ratio <= ours.bytes_ratio <= 1.02
    assert ours.threadgroup_memory <= 20480
    assert ours.unpack <= 2.2  # once for all query heads
    theirs = mlx_row(group, dim if dim in cost_table.MLX_DIMS else max(cost_table.MLX_DIMS))
    assert theirs.reductions == pytest.approx(1)
    assert ours.reductions <= (0.25 if group >= 4 else 1) * theirs.reductions
    # Reading takes 9.6 lane cycles for a number of 4 bits, and 34 for one of 16, on the devices of the table.
    assert ours.cycles <= (9.6 * bits / 4 if group == 1 else theirs.cycles)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("heads", "latent"), cost_table.MLA_SHAPES)
def test_a_threadgroup_reads_the_latent_once(heads: int, latent: int, bits: int) -> None:
    row = cost_table.measure(cost_table.mla_case(bits, heads, latent))
    threadgroups = -(-heads // ROWS_OF_A_LATENT[latent])
    assert 1 <= row.memory_ratio <= 1.02
    assert threadgroups <= row.bytes_ratio <= 1.02 * threadgroups
    assert row.unpack <= 1.8 * threadgroups  # once for both products
    assert row.reductions <= 0.25
    assert row.cycles <= 1.27 * row.matrix * cost_table.MATRIX_CYCLES / 16  # the products themselves, and a quarter


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("heads", "latent"), cost_table.MLA_SHAPES)
def test_blocks_of_heads_that_read_the_same_part_of_the_latent_run_side_by_side(
    heads: int, latent: int, bits: int
) -> None:
    from_memory, by_threadgroups = cost_table.read_of_splits(cost_table.mla_case(bits, heads, latent), splits=4)
    assert 1 <= from_memory <= 1.02
    assert by_threadgroups <= 1.02 * -(-heads // ROWS_OF_A_LATENT[latent])


@pytest.mark.parametrize("format", [Format.affine(4), Format.affine(3, rotated=True), Format.named("mxfp8")], ids=str)
def test_a_token_is_put_into_the_cache_in_three_dispatches(format: Format) -> None:
    assert append_cost.count_dispatches(QuantizedKVCache(format)) == {"quantize_rows": 1, "SliceUpdate": 2}
