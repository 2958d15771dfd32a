"""What the CUDA and the Metal kernel that quantize new rows have in common: when one serves, and the text of its body.

The kernels themselves are ``cuda/row_quantization.cuh`` and ``metal/row_quantization.metal``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.rotation import block_size

__all__ = ["OUTPUTS", "RowKernel", "Rows", "can_rotate", "kernel_body", "launch", "thread_count"]

RowKernel = Callable[..., list[mx.array]]
"""A kernel of ``mx.fast.cuda_kernel`` or ``mx.fast.metal_kernel``."""

OUTPUTS = ("codes", "scales")
_PACK = 8
"""Numbers that a thread quantizes."""
_THREADS = 128
"""Threads of a threadgroup."""


@dataclass(frozen=True)
class Rows:
    """The rows that one compiled kernel takes, whatever their batch, heads and count.

    format: fitted. Where it is rotated, the kernel rotates the rows itself (:func:`can_rotate`). dim: numbers of a row
    before padding. sides: 1, or 2 for keys and values.
    """

    format: Format
    dtype: mx.Dtype
    dim: int
    sides: int

    @property
    def padded(self) -> int:
        """Stored row length."""
        return self.format.fit(self.dim)[1]

    @property
    def rotated_block(self) -> int:
        """Numbers that are rotated together; 0 where none are."""
        return block_size(self.dim) if self.format.rotated else 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the kernel's inputs."""
        return ("rows",) if self.sides == 1 else ("keys", "values")


def can_rotate(dim: int) -> bool:
    """Whether a kernel can rotate rows of ``dim`` numbers: blocks within a warp or SIMD-group, and no padding."""
    return dim % 32 == 0 and block_size(dim) <= 32 * _PACK


def thread_count(rows: Rows, batch: int, heads: int, count: int) -> int:
    """Threads with numbers of their own, for ``count`` rows of that many heads, of all sides, and sequences."""
    return batch * heads * count * (rows.padded // _PACK)


def launch(threads: int) -> dict[str, Any]:
    """The grid of so many threads: whole warps, since all threads of one take part in its exchanges."""
    return {"grid": (-(-threads // 32) * 32, 1, 1), "threadgroup": (_THREADS, 1, 1)}


def kernel_body(rows: Rows, scalar: str, mode: int, thread: str, outputs: Sequence[str] = OUTPUTS) -> str:
    """The body of the kernel: its template, called with what MLX passes for each input.

    scalar: the type of a number. mode: the number of the format's mode. thread: the index of the thread in the grid.
    outputs: where codes and scales go.
    """
    sides = [
        f"Side<{scalar}>{{{name}, {name}_shape[1], {', '.join(f'{name}_strides[{axis}]' for axis in range(4))}}}"
        for name in rows.inputs
    ]
    first = rows.inputs[0]
    if rows.sides == 1:
        sides.append(f"Side<{scalar}>{{{first}, 0, 0, 0, 0, 0}}")
    block = rows.rotated_block
    parameters = f"{rows.format.bits}, {rows.format.group_size}, {mode}, {rows.dim}, {rows.padded}, {block}"
    rotation_scale = f"{max(1, block) ** -0.5}f"
    arguments = (*sides, f"{first}_shape[0]", f"{first}_shape[2]", rotation_scale, *outputs, thread)
    return f"quantize_rows<{parameters}>({', '.join(arguments)});\n"
