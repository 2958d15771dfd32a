"""What stands in the place of ``mx.fast.metal_kernel`` where a kernel is to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

__all__ = ["failing_kernels", "wrong_kernels"]


def wrong_kernels(**options: Any) -> Callable[..., list[mx.array]]:
    """Kernels that give zeros."""

    def call(**launch: Any) -> list[mx.array]:
        return [mx.zeros(s, d) for s, d in zip(launch["output_shapes"], launch["output_dtypes"])]

    return call


def failing_kernels(**options: Any) -> Callable[..., list[mx.array]]:
    """Kernels that do not compile."""

    def call(**launch: Any) -> list[mx.array]:
        raise RuntimeError("[metal::Device] Unable to build metal library from source")

    return call
