"""Time the CUDA kernels beside what MLX has: ``python -m qsdpa_patch.kernels.cuda.benchmark [NAME ...]``.

Calls run one after another, each on the output of the last, over buffers that together exceed the L2 cache. The time of
a call is the slope between few and many calls, the median of several. Keys and values lie as caches store them: in
slices of buffers with room for more. Bytes are the packed codes, scales and biases of K and V (and the rope keys), each
once; the percentage is of the copy bandwidth, the larger of the one read in the same run and 4.3 TB/s. TFLOP/s are of
the two products alone. The first run takes minutes longer: MLX compiles its own quantized product for each format, and
keeps it on disk.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from qsdpa_patch.kernels import reference
from qsdpa_patch.kernels.attention_call import AttentionCall, RopeTerm, check_call
from qsdpa_patch.kernels.cuda import backend
from qsdpa_patch.kernels.cuda.tickets import start as start_evaluation
from qsdpa_patch.kernels.dtypes import dtype_name
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import PackedStack, QuantizedTensor, quantize_parts, stack_parts
from qsdpa_patch.output_files import check_writable, write_json

__all__ = ["SHAPES", "Shape", "copy_bandwidth", "main", "time_calls"]

_CACHE_BYTES = 80e6
_NOMINAL_BANDWIDTH = 4.3e12
_ROOM = 256
"""Rows that a cache's buffers have beyond those in use."""
_LAYERS = 32
"""Calls that go to the device together, as those of a step of generation do."""


@dataclass(frozen=True)
class Shape:
    """A call to time. ``rope`` > 0: absorbed MLA, one latent for keys and values. ``value_dim`` 0: as ``dim``."""

    batch: int = 1
    query_heads: int = 32
    kv_heads: int = 8
    length: int = 1
    dim: int = 128
    count: int = 131072
    keys: Format = Format()  # noqa: RUF009 - frozen
    values: Format | None = None
    dtype: mx.Dtype = mx.float16
    rope: int = 0
    value_dim: int = 0

    def __str__(self) -> str:
        values = self.values or self.keys
        formats = f"{self.keys}" if values == self.keys else f"K {self.keys}, V {values}"
        length = f" L{self.length}" if self.length > 1 else ""
        dim = f"D{self.dim}" + (f" Dv{self.value_dim}" if self.value_dim else "")
        dtype = dtype_name(self.dtype)
        return f"B{self.batch} Hq{self.query_heads} Hkv{self.kv_heads}{length} {dim} N{self.count} {formats} {dtype}"

    @property
    def value_length(self) -> int:
        """Numbers of a row of values."""
        return self.value_dim or self.dim

    @property
    def operations(self) -> int:
        """Multiplications and additions of the two products, without those that a causal mask leaves out."""
        pairs = self.length * self.count - self.length * (self.length - 1) // 2
        return 2 * self.batch * self.query_heads * pairs * (self.dim + self.rope + self.value_length)


def _affine(bits: int, group: int = 64) -> Format:
    return Format.affine(bits, group)


_LONG = Shape()
_WIDE = Shape(batch=4, count=65536)
_PROMPT = Shape(length=2048, dim=256, count=32768)
SHAPES = {
    "4bit": _LONG,
    "4bit-bf16": replace(_LONG, dtype=mx.bfloat16),
    "8bit": replace(_LONG, keys=_affine(8)),
    "8bit-bf16": replace(_LONG, keys=_affine(8), dtype=mx.bfloat16),
    "b8-32k": replace(_LONG, batch=8, count=32768),
    "b8-128k": replace(_LONG, batch=8),
    "mha": replace(_LONG, kv_heads=32),
    "gqa16-d256": replace(_LONG, kv_heads=2, dim=256),
    "d64": replace(_WIDE, dim=64),
    "d256": replace(_WIDE, dim=256),
    "d512": replace(_WIDE, dim=512),
    **{f"{bits}bit-b4": replace(_WIDE, keys=_affine(bits)) for bits in (2, 3, 5, 6)},
    "g32": replace(_WIDE, keys=_affine(4, 32)),
    "g128": replace(_WIDE, keys=_affine(4, 128)),
    **{name: replace(_WIDE, keys=Format.named(name)) for name in ("mxfp4", "mxfp8", "nvfp4")},
    "k8v4": replace(_WIDE, keys=_affine(8), values=_affine(4)),
    "mla-b1": Shape(query_heads=128, kv_heads=1, dim=512, count=65536, rope=64),
    "mla-b8": Shape(batch=8, query_heads=128, kv_heads=1, dim=512, count=65536, rope=64),
    **{f"n{n}": replace(_LONG, count=n) for n in (1024, 4096, 8192, 32768)},
    "L4": replace(_LONG, length=4),
    "L8": replace(_LONG, length=8),
    "L8-8bit": replace(_LONG, length=8, keys=_affine(8)),
    "L16": replace(_LONG, length=16),
    "L4-d256": replace(_LONG, length=4, dim=256),
    "L8-d256": replace(_LONG, length=8, dim=256),
    "prefill": _PROMPT,
    "prefill-bf16": replace(_PROMPT, dtype=mx.bfloat16),
    "prefill-8bit": replace(_PROMPT, keys=_affine(8)),
    "prefill-d512": replace(_PROMPT, query_heads=16, kv_heads=2, dim=512),
    "prefill-192-128": replace(_PROMPT, query_heads=16, kv_heads=16, dim=192, value_dim=128),
}


def time_calls(step: Callable[[mx.array, int], mx.array], start: mx.array, few: int, many: int, repeats: int) -> float:
    """Seconds a call of ``step(previous output, index)``: the slope between ``few`` and ``many`` chained calls.

    As in generation, the host prepares the calls of a step while the device works on those of the last.
    """

    def run(calls: int) -> float:
        x = start
        begin = time.perf_counter()
        for i in range(calls):
            x = step(x, i)
            if i % _LAYERS == _LAYERS - 1:
                start_evaluation(x)
        mx.eval(x)
        return time.perf_counter() - begin

    run(few)
    return statistics.median((run(many) - run(few)) / (many - few) for _ in range(repeats))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    x = mx.ones((1 << 30,), dtype=mx.uint32)
    mx.eval(x)

    def copy(_: mx.array, i: int) -> mx.array:
        return x + mx.array(i, dtype=mx.uint32)

    def run(calls: int) -> float:
        begin = time.perf_counter()
        for i in range(calls):
            mx.eval(copy(x, i))
        return time.perf_counter() - begin

    run(2)
    return 2 * x.nbytes / statistics.median((run(12) - run(2)) / 10 for _ in range(3))


def _tensor(shape: tuple[int, ...], format: Format, dtype: mx.Dtype) -> QuantizedTensor:
    """Random rows ``[B, H, N, D]``, drawn for one sequence at a time: those of all may take gigabytes."""
    each = []
    for _ in range(shape[0]):
        each.append(quantize_parts(mx.random.normal((1, *shape[1:])).astype(dtype), format))
        mx.eval(each[-1])
    codes, scales, *biases = (mx.concatenate(list(parts)) for parts in zip(*each))
    mx.eval(codes, scales, biases)
    return QuantizedTensor(codes, scales, biases[0] if biases else None, format, dtype=dtype)


def _product(x: mx.array, tensor: QuantizedTensor, *, transpose: bool) -> mx.array:
    """``x`` ``[B, Hkv, G, L, ...]`` times ``tensor`` (transposed) as stock multiplies them."""
    codes, scales, *biases = (mx.expand_dims(part, axis=2) for part in tensor.parts)
    f = tensor.format
    return mx.quantized_matmul(
        x, codes, scales, biases[0] if biases else None, transpose, group_size=f.group_size, bits=f.bits, mode=f.mode
    )


def _as_in_a_cache(keys: QuantizedTensor, values: QuantizedTensor) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Keys and values in buffers with room for more rows; in the same two where they are alike."""
    alike = (keys.format, keys.dim) == (values.format, values.dim)
    tensors: list[QuantizedTensor] = []
    for sides in [[keys, values]] if alike else [[keys], [values]]:
        buffers = [mx.pad(x, [(0, 0), (0, 0), (0, _ROOM), (0, 0)]) for x in stack_parts([x.parts for x in sides])]
        mx.eval(buffers)
        codes, scales = (x[:, :, : keys.shape[2]] for x in buffers)
        tensors += PackedStack(codes, scales, len(sides), sides[0].format, dim=sides[0].dim, dtype=keys.dtype).tensors()
    return tensors[0], tensors[1]


class Problem:
    """Operands of a shape: enough copies of keys and values to exceed the cache.

    pairs: keys and values, each in arrays of its own, for the peers. cached: the same as caches store them.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        row = (shape.batch, shape.kv_heads, shape.count, shape.dim)
        self.scale = shape.dim**-0.5
        self.queries = mx.random.normal((shape.batch, shape.query_heads, shape.length, shape.dim)).astype(shape.dtype)
        self.mask = "causal" if shape.length > 1 else None
        self.pairs: list[tuple[QuantizedTensor, QuantizedTensor]] = []
        self.cached: list[tuple[QuantizedTensor, QuantizedTensor]] = []
        self.ropes: list[RopeTerm | None] = []
        while not self.pairs or len(self.pairs) * self.packed_bytes < max(_CACHE_BYTES, 1.5 * self.packed_bytes):
            keys = _tensor(row, shape.keys, shape.dtype)
            value_row = (*row[:3], shape.value_length)
            values = keys if shape.rope else _tensor(value_row, shape.values or shape.keys, shape.dtype)
            self.pairs.append((keys, values))
            self.cached.append((keys, values) if shape.rope else _as_in_a_cache(keys, values))
            self.ropes.append(self._rope() if shape.rope else None)
        mx.eval(self.queries)

    def _rope(self) -> RopeTerm:
        s = self.shape
        queries = 0.1 * mx.random.normal((s.batch, s.query_heads, s.length, s.rope)).astype(s.dtype)
        keys = mx.random.normal((s.batch, 1, s.count, s.rope)).astype(s.dtype)
        mx.eval(queries, keys)
        return RopeTerm(queries, keys)

    @property
    def packed_bytes(self) -> int:
        keys, values = self.pairs[0]
        rope = self.ropes[0]
        return keys.packed_nbytes + (0 if values is keys else values.packed_nbytes) + (rope.keys.nbytes if rope else 0)

    def call(self, queries: mx.array, i: int) -> AttentionCall:
        keys, values = self.cached[i % len(self.cached)]
        rope = self.ropes[i % len(self.pairs)]
        return check_call(queries, keys, values, scale=self.scale, mask=self.mask, rope=rope)

    def fused(self) -> float:
        return self._time(lambda q, i: backend.attend(self.call(q, i)))

    def stock(self) -> float:
        """mlx-lm's quantized attention: two quantized products with a softmax between."""
        s = self.shape
        groups = s.query_heads // s.kv_heads

        def step(queries: mx.array, i: int) -> mx.array:
            keys, values = self.pairs[i % len(self.pairs)]
            q = (queries * self.scale).reshape(s.batch, s.kv_heads, groups, s.length, s.dim)
            scores = _product(q, keys, transpose=True)
            if self.mask:
                causal = reference.causal_mask(s.length, s.count)
                scores = mx.where(causal, scores, mx.finfo(scores.dtype).min)
            weights = mx.softmax(scores, axis=-1, precise=True)
            return _product(weights, values, transpose=False).reshape(*queries.shape[:3], s.value_length)

        return self._time(step)

    def dequantized(self) -> float:
        """Dequantize all, then MLX's own attention."""

        def step(queries: mx.array, i: int) -> mx.array:
            keys, values = (x.dequantize(self.shape.dtype) for x in self.pairs[i % len(self.pairs)])
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=self.mask)

        return self._time(step)

    def unquantized(self) -> float:
        """MLX's own attention over keys and values that were never quantized, as slices of a cache's buffers."""
        s = self.shape
        capacity = s.count + 256
        copies = []
        dims = (s.dim, s.value_length)
        per_copy = s.batch * s.kv_heads * capacity * sum(dims) * s.dtype.size
        for _ in range(max(1, int(_CACHE_BYTES // per_copy) + 1)):
            pair = [mx.random.normal((s.batch, s.kv_heads, capacity, dim)).astype(s.dtype) for dim in dims]
            mx.eval(pair)
            views = [x[:, :, : s.count] for x in pair]
            mx.eval(views)
            copies.append(views)

        def step(queries: mx.array, i: int) -> mx.array:
            keys, values = copies[i % len(copies)]
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=self.mask)

        return self._time(step)

    def _time(self, attend: Callable[[mx.array, int], mx.array]) -> float:
        def step(queries: mx.array, i: int) -> mx.array:
            out = attend(queries, i)
            rest = queries[..., self.shape.value_length :]  # of an output shorter than the next queries
            return mx.concatenate([out, rest], axis=-1) if rest.size else out

        rough = time_calls(step, self.queries, 2, 8, 1)
        if rough > 5e-4:
            return time_calls(step, self.queries, 4, 16, 3)
        return time_calls(step, self.queries, 2 * _LAYERS, (8 if rough < 2e-4 else 4) * _LAYERS, 5)


def _measure(shape: Shape, peers: bool, unquantized: dict[Shape, float | str]) -> dict[str, float | str]:
    """Microseconds of the kernel and of its peers. ``unquantized`` keeps those that formats have no part in."""
    problem = Problem(shape)
    row: dict[str, float | str] = {"shape": str(shape), "megabytes": problem.packed_bytes / 1e6}
    taken, reason = backend.has_fused_kernel(problem.call(problem.queries, 0).signature)
    if not taken:
        return {**row, "reason": reason}
    row["fused"] = problem.fused() * 1e6
    if peers and not shape.rope:
        row["stock"] = _microseconds(problem.stock)
        row["dequantized"] = _microseconds(problem.dequantized)
        plain = replace(shape, keys=Format(), values=None)
        if plain not in unquantized:
            unquantized[plain] = _microseconds(problem.unquantized)
        row["unquantized"] = unquantized[plain]
    return row


def _microseconds(measure: Callable[[], float]) -> float | str:
    """What ``measure`` gives, or why it failed: stock has no kernel for many shapes."""
    try:
        return measure() * 1e6
    except (RuntimeError, ValueError) as error:
        return "failed: " + str(error).splitlines()[0][:60]


def main() -> None:
    """Measure the named shapes, or all, and print a table."""
    parser = argparse.ArgumentParser(description="Time the CUDA kernels beside what MLX has.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--no-peers", action="store_true", help="only the kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, after each shape")
    options = parser.parse_args()
    if options.json:
        try:
            check_writable("--json", options.json)
        except ValueError as error:
            parser.error(str(error))
    bandwidth = copy_bandwidth()
    print(f"mlx {version('mlx')}; copy bandwidth {bandwidth / 1e12:.2f} TB/s; times in microseconds")
    print("| shape | MB | fused | of copy | TFLOP/s | stock | dequantize + SDPA | unquantized SDPA |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    unquantized: dict[Shape, float | str] = {}
    for name in options.names or SHAPES:
        row = _measure(SHAPES[name], not options.no_peers, unquantized)
        rows.append({"name": name, **row})
        print(_table_row(row, SHAPES[name], max(bandwidth, _NOMINAL_BANDWIDTH)), flush=True)
        if options.json:
            write_json(options.json, {"bandwidth": bandwidth, "rows": rows})


def _table_row(row: dict[str, float | str], shape: Shape, ceiling: float) -> str:
    """``row`` as a line of a Markdown table; ``ceiling`` in bytes a second."""
    if "reason" in row:
        return f"| {row['shape']} | {row['megabytes']:.0f} | {row['reason']} |"
    seconds = float(row["fused"]) * 1e-6
    share = float(row["megabytes"]) * 1e6 / seconds / ceiling
    rate = shape.operations / seconds / 1e12
    peers = [_against(row, peer) for peer in ("stock", "dequantized", "unquantized")]
    cells = (row["shape"], f"{row['megabytes']:.0f}", f"{row['fused']:.1f}", f"{share:.0%}", f"{rate:.0f}", *peers)
    return f"| {' | '.join(map(str, cells))} |"


def _against(row: dict[str, float | str], peer: str) -> str:
    time = row.get(peer, "-")
    return time if isinstance(time, str) else f"{time:.1f} ({time / float(row['fused']):.1f}x)"


if __name__ == "__main__":
    main()
