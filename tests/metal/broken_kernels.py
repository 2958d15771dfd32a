"""What stands in the place of ``mx.fast.metal_kernel`` where a kernel is to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

__all__ = ["failing_kernels", "kernels_that_fail_late", "wrong_kernels"]


def wrong_kernels(**options: Any) -> Callable[..., list[mx.array]]:
    """Kernels that give zeros."""

    def call(**launch: Any) -> list[mx.array]:
        return [mx.zeros(s, d) for s, d in zip(launch["output_shapes"], launch["output_dtypes"])]

    return call


def kernels_that_fail_late(**options: Any) -> Callable[..., list[mx.array]]:
    """Kernels whose results cannot be evaluated: on a GPU, MLX compiles them only then."""

    def call(**launch: Any) -> list[mx.array]:
        half = mx.zeros((1, 1, 1), mx.float16)  # which this product does not take on the CPU
        failing = mx.gather_mm(half, half, rhs_indices=mx.array([0]), stream=mx.cpu).reshape(())
        return [mx.broadcast_to(failing.astype(d), s) for s, d in zip(launch["output_shapes"], launch["output_dtypes"])]

    return call


def failing_kernels(**options: Any) -> Callable[..., list[mx.array]]:
    """Kernels that do not compile."""

    def call(**launch: Any) -> list[mx.array]:
        raise RuntimeError(
            "[metal::Device] Unable to build metal library from source\n"
            "program_source:7:3: error: no such type\n1 error generated.\n"
        )

    return call
