"""MLX's own float attention kernels for decode (sdpa_vector.h of the installed wheel), run in the emulator.

Known-good code to try the emulator on, and what the cost of our kernels is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tests.metal.emulator import Cost
from tests.metal.emulator.compiler import build, build_counting
from tests.metal.emulator.signature import TYPE_NAMES
from tests.metal.emulator.worker_process import WRITABLE, Argument, run

__all__ = ["Problem", "attend"]

_BLOCKS = 32
_CONSTANTS = {"blocks": _BLOCKS}  # function constants; all others 0: no mask, not causal, no sinks


@dataclass(frozen=True)
class Problem:
    """One query row of ``group`` heads for each of ``kv_heads``, over ``count`` keys of ``dim`` random numbers."""

    dtype: mx.Dtype
    dim: int
    group: int
    kv_heads: int
    count: int

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def scale(self) -> float:
        return float(np.float32(self.dim**-0.5))

    def arrays(self) -> list[mx.array]:
        """Queries ``[1, heads, 1, dim]``, keys and values ``[1, kv_heads, count, dim]``."""
        shapes = [(1, self.heads, 1, self.dim), *[(1, self.kv_heads, self.count, self.dim)] * 2]
        return [mx.random.normal(s, key=mx.random.key(i)).astype(self.dtype) for i, s in enumerate(shapes)]

    def expected(self) -> mx.array:
        queries, keys, values = (x.astype(mx.float32) for x in self.arrays())
        with mx.stream(mx.cpu):
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale)


def attend(
    problem: Problem, kernel: str, replace: tuple[str, str] = ("", ""), *, count_instructions: bool = False
) -> tuple[mx.array, list[Cost]]:
    """Attention of ``problem`` in float32, and the cost of each launch.

    Args:
        kernel: ``"vector"``, ``"two passes"`` or ``"two passes, shared keys"`` (that of MLX for grouped heads).
        replace: a text in MLX's source and what to put in its place.
        count_instructions: of the first pass, instead of checking memory.
    """
    if kernel == "vector":
        return _vector(problem, replace)
    return _two_passes(problem, "shared" in kernel, count_instructions)


def _source() -> str:
    return (Path(mx.__file__).parent / "include/mlx/backend/metal/kernels/sdpa_vector.h").read_text()


def _inputs(problem: Problem, first_stride: int) -> list[Argument]:
    """Queries, keys, values, N, the four strides and the scale, from buffer ``first_stride - 1`` (N) on."""
    p = problem
    raw: list[NDArray[Any]] = [np.array(x.view(mx.uint16) if p.dtype == mx.bfloat16 else x) for x in p.arrays()]
    strides = [p.count * p.dim, p.dim] * 2
    numbers: list[np.generic] = [np.int32(p.count), *map(np.uint64, strides), np.float32(p.scale)]
    names = ["N", "k_head_stride", "k_seq_stride", "v_head_stride", "v_seq_stride", "scale"]
    arguments = [
        Argument(i, n, x.nbytes, x.tobytes()) for i, (n, x) in enumerate(zip(("queries", "keys", "values"), raw))
    ]
    for i, (name, number) in enumerate(zip(names, numbers)):
        arguments.append(Argument(first_stride - 1 + i, name, number.nbytes, number.tobytes()))
    return arguments


def _unused(*indices: int) -> list[Argument]:
    """Masks and sinks, which are not there: eight bytes each, so that a pointer to them can be formed."""
    return [Argument(i, f"unused{i}", 8, bytes(8)) for i in indices]


def _int(index: int, name: str, value: int) -> Argument:
    return Argument(index, name, 4, np.int32(value).tobytes())


def _float32(data: bytes, problem: Problem) -> mx.array:
    array = mx.array(np.frombuffer(data, np.uint8)).view(problem.dtype)
    return array.reshape(1, problem.heads, 1, problem.dim).astype(mx.float32)


def _vector(p: Problem, replace: tuple[str, str]) -> tuple[mx.array, list[Cost]]:
    source = _source().replace(*replace) if replace[0] else _source()
    library = build(
        source,
        "sdpa_vector",
        [("T", TYPE_NAMES[p.dtype]), ("D", str(p.dim)), ("V", str(p.dim))],
        function_constants=_CONSTANTS,
    )
    arguments = [
        *_inputs(p, first_stride=6),
        Argument(3, "out", p.heads * p.dim * p.dtype.size, None, WRITABLE),
        _int(4, "gqa_factor", p.group),
        *_unused(11, 12, 13, 14, 15, 16),
        _int(17, "num_q_heads", p.heads),
    ]
    outputs, cost = run("sdpa_vector", library, arguments, (1024 * p.heads, 1, 1), (1024, 1, 1))
    return _float32(outputs[0], p), [cost]


def _two_passes(p: Problem, shared: bool, count_instructions: bool) -> tuple[mx.array, list[Cost]]:
    template = [("T", TYPE_NAMES[p.dtype]), ("D", str(p.dim)), ("V", str(p.dim))]
    name = "sdpa_vector_2pass_1"
    if shared:
        name += "_gqa"
        template += [("G", str(p.group)), ("HPT", "2")]
    partials = [
        Argument(3, "partials", p.heads * _BLOCKS * p.dim * p.dtype.size, None, WRITABLE),
        Argument(4, "sums", p.heads * _BLOCKS * 4, None, WRITABLE),
        Argument(5, "maxs", p.heads * _BLOCKS * 4, None, WRITABLE),
    ]
    inputs = _inputs(p, first_stride=8)
    arguments = [*inputs, *partials, *([] if shared else _unused(13, 14, 15, 16, 17, 18))]
    blocks: list[dict[str, int]] = []
    if count_instructions:
        library, blocks = build_counting(_source(), name, template, function_constants=_CONSTANTS)
    else:
        library = build(_source(), name, template, function_constants=_CONSTANTS)
    grid, threadgroup = (32 * p.kv_heads, p.group, _BLOCKS), (32, p.group, 1)
    made, first = run(name, library, arguments, grid, threadgroup, blocks=blocks)
    merge = [Argument(i, a.name, a.size, data) for i, (a, data) in enumerate(zip(partials, made))]
    merge += [Argument(3, "out", p.heads * p.dim * p.dtype.size, None, WRITABLE), _int(4, "blocks", _BLOCKS)]
    library = build(_source(), "sdpa_vector_2pass_2", template[:2], function_constants=_CONSTANTS)
    outputs, second = run("sdpa_vector_2pass_2", library, merge, (1024 * p.heads, 1, 1), (1024, 1, 1))
    return _float32(outputs[0], p), [first, second]
