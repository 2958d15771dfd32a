"""Bounds on the counted work of the decode kernels. ``python -m tests.metal.cost_table`` prints all of it."""

from __future__ import annotations

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
SHAPES = [(bits, group, dim) for bits, dim in ((4, 64), (4, 128), (8, 256), (4, 512)) for group in (1, 4, 16)]


@pytest.mark.parametrize(("bits", "group", "dim"), SHAPES)
def test_packed_bytes_are_read_once_and_lanes_seldom_exchanged(bits: int, group: int, dim: int) -> None:
    row = cost_table.measure(cost_table.decode_case(bits, group, dim))
    assert 1 <= row.bytes_ratio <= 1.02
    assert row.reductions <= (0.25 if group >= 4 else 1)  # MLX's kernels for float keys: 1 for each key and query head
    assert row.threadgroup_memory <= 20480
    assert row.unpack <= 3.6  # once for all query heads


@pytest.mark.parametrize("heads", [16, 32])
def test_the_latent_is_read_once(heads: int) -> None:
    row = cost_table.measure(cost_table.mla_case(4, heads))
    assert 1 <= row.bytes_ratio <= 1.02
    assert row.reductions <= 0.25


@pytest.mark.parametrize("group", [4, 8])
def test_less_work_than_mlx_does_for_float_keys(group: int) -> None:
    ours = cost_table.measure(cost_table.decode_case(4, group, 128))
    theirs = cost_table.measure_mlx(group, 128)
    assert theirs.reductions == pytest.approx(1)
    assert ours.reductions <= theirs.reductions / 4
    assert ours.lane_operations < theirs.lane_operations


@pytest.mark.parametrize("format", [Format.affine(4), Format.affine(3, 32), Format.named("mxfp8")], ids=str)
def test_a_token_is_put_into_the_cache_in_three_dispatches(format: Format) -> None:
    assert append_cost.count_dispatches(QuantizedKVCache(format)) == {"quantize_rows": 1, "SliceUpdate": 2}
