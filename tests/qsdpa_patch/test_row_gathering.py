"""Gathering packed rows, for models that pick the keys to attend to."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import pytest

import qsdpa_patch
from qsdpa_patch import QuantizedTensor, quantize
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.latent_rope import RopeKeys
from qsdpa_patch.row_gathering import GATHERING_MODULES, take_along_axis


def picked_rows(count: int, dim: int) -> mx.array:
    """Indices ``[2, 1, 5, dim]``, as DeepSeek's model broadcasts them."""
    return mx.broadcast_to(mx.random.randint(0, count, (2, 1, 5, 1), key=mx.random.key(1)), (2, 1, 5, dim))


@pytest.mark.parametrize("format", [Format.affine(4, 64), Format.affine(3, 32, symmetric=True), Format.named("mxfp8")])
@pytest.mark.parametrize("axis", [2, -2])
def test_rows_stay_packed(format: Format, axis: int) -> None:
    tensor = quantize(mx.random.normal((2, 1, 40, 128), key=mx.random.key(0)), format)
    indices = picked_rows(40, 128)
    gathered = take_along_axis(tensor, indices, axis=axis)
    assert type(gathered) is QuantizedTensor
    assert gathered.codes.shape[2] == 5
    assert mx.array_equal(gathered, mx.take_along_axis(tensor.dequantize(), indices, axis=2))


def test_rope_keys_stay_rope_keys() -> None:
    keys = mx.random.normal((2, 1, 40, 64), key=mx.random.key(0))
    gathered = take_along_axis(RopeKeys(keys), picked_rows(40, 64), axis=2)
    assert type(gathered) is RopeKeys
    assert mx.array_equal(gathered, mx.take_along_axis(keys, picked_rows(40, 64), axis=2))


def test_all_else_is_as_in_mlx() -> None:
    plain = mx.arange(12).reshape(3, 4)
    indices = mx.array([[1, 0], [3, 3], [2, 1]])
    assert mx.array_equal(take_along_axis(plain, indices, axis=1), mx.take_along_axis(plain, indices, axis=1))
    assert mx.array_equal(take_along_axis(plain, mx.array([5, 7])), mx.take_along_axis(plain, mx.array([5, 7]), None))
    tensor = quantize(mx.random.normal((2, 1, 4, 64)), Format.affine(8))
    columns = mx.zeros((2, 1, 4, 3), mx.uint32)
    assert type(take_along_axis(tensor, columns, axis=-1)) is mx.array


@pytest.mark.parametrize("name", GATHERING_MODULES)
def test_only_such_modules_see_it_and_only_while_enabled(name: str) -> None:
    module: Any = import_module(name)
    with qsdpa_patch.enabled():
        assert module.mx.take_along_axis is take_along_axis
        assert module.mx.array is mx.array
        assert mx.take_along_axis is not take_along_axis
    assert module.mx is mx
