"""MLX's dtypes by name, for texts and files."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

__all__ = ["dtype_name", "dtype_of_name"]


def dtype_name(dtype: mx.Dtype) -> str:
    """``"float16"`` for :data:`mlx.core.float16`."""
    return str(dtype).rpartition(".")[2]


def dtype_of_name(name: str) -> mx.Dtype:
    """The dtype that :func:`dtype_name` gives ``name``."""
    return cast(mx.Dtype, getattr(mx, name))
