"""Random attention calls, shared by the tests of every kernel backend.

A case is data, made from a seed: shapes, formats, dtypes, the kind of mask. :func:`build` makes its arrays (keys and
values are slices of larger buffers, as a cache hands them out) and :func:`expected` the float32 reference.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from qsdpa_patch.kernels import reference
from qsdpa_patch.kernels.attention_call import AttentionCall, RopeTerm, check_call
from qsdpa_patch.kernels.dtypes import dtype_name
from qsdpa_patch.kernels.format import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_FORMATS, Format
from qsdpa_patch.kernels.quantized_tensor import PackedStack, QuantizedTensor, quantize, stack_parts

TOLERANCES = {mx.float16: 2e-3, mx.bfloat16: 1e-2, mx.float32: 1e-5}
"""Largest error over largest magnitude, by dtype of the queries."""

MASKS = ("none", "causal", "bool", "additive", "padding", "fully-masked-row")
FORMATS = (
    *(Format.affine(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES),
    *(Format.affine(bits, 64, symmetric=True) for bits in (4, 8)),
    *(Format.named(name) for name in FLOAT_FORMATS),
)


@dataclass(frozen=True)
class Case:
    """One random call.

    capacity: length of the buffers that keys and values are slices of.
    stacked: keys and values that are quantized alike share their buffers, as in a cache.
    """

    seed: int
    batch: int = 1
    kv_heads: int = 2
    group: int = 1
    length: int = 1
    count: int = 100
    capacity: int = 100
    key_dim: int = 64
    value_dim: int = 64
    dtype: mx.Dtype = mx.float32
    key_format: Format = Format()  # noqa: RUF009 - frozen
    value_format: Format = Format()  # noqa: RUF009 - frozen
    mask: str = "none"
    sinks: bool = False
    rope_dim: int = 0
    outliers: bool = False
    stacked: bool = False

    @property
    def is_mla(self) -> bool:
        return self.rope_dim > 0

    def __str__(self) -> str:
        dtype = dtype_name(self.dtype)
        return (
            f"seed={self.seed} B{self.batch} Hkv{self.kv_heads} G{self.group} L{self.length} N{self.count} "
            f"D{self.key_dim} Dv{self.value_dim} {dtype} K:{self.key_format} V:{self.value_format} mask={self.mask}"
            f"{' sinks' if self.sinks else ''}{f' rope{self.rope_dim}' if self.rope_dim else ''}"
            f"{' outliers' if self.outliers else ''}{' stacked' if self.stacked else ''}"
        )


def random_case(seed: int, *, max_count: int = 700, max_length: int = 16) -> Case:
    """A case of ordinary attention, drawn from everything the fused kernels take."""
    rng = random.Random(seed)
    key_dim = rng.choice((64, 128, rng.choice((96, 192, 256, 512)), 32 * rng.randint(1, 16)))
    value_dim = key_dim if rng.random() < 0.7 else rng.choice((64, 128, 32 * rng.randint(1, 16)))
    length = rng.choice((1, 1, 1, rng.randint(1, max_length)))
    count = rng.choice((rng.randint(1, 40), rng.randint(1, max_count), rng.choice((64, 128, 256, 257))))
    count = max(count, length)
    key_format = rng.choice(FORMATS).fit(key_dim)[0]
    value_format = (key_format if rng.random() < 0.5 else rng.choice(FORMATS)).fit(value_dim)[0]
    return Case(
        seed=seed,
        batch=rng.choice((1, 1, 2, 3)),
        kv_heads=rng.choice((1, 2, 3)),
        group=rng.choice((1, 2, 3, 4, 5, 7, 8, 16)),
        length=length,
        count=count,
        capacity=count + rng.choice((0, 1, 29, 156)),
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=rng.choice((mx.float16, mx.bfloat16, mx.float32)),
        key_format=key_format,
        value_format=value_format,
        mask=rng.choice(MASKS),
        sinks=rng.random() < 0.25,
        outliers=rng.random() < 0.25,
        stacked=rng.random() < 0.75,
    )


def random_wide_case(seed: int) -> Case:
    """A case of 9 to 64 query rows to a key head, of what the CUDA kernel with warpgroup products takes."""
    rng = random.Random(seed)
    key_dim, value_dim = (rng.choice((128, 256)) for _ in range(2))
    if rng.random() < 0.6:
        value_dim = key_dim
    key_format, value_format = (
        Format.affine(rng.choice((2, 4, 4, 8)), rng.choice((64, 64, 128)), symmetric=rng.random() < 0.25)
        for _ in range(2)
    )
    if rng.random() < 0.4 and key_dim == value_dim:
        value_format = key_format
    group, length = rng.choice(((16, 1), (8, 2), (10, 1), (4, 4), (4, 8), (7, 4), (5, 5), (3, 16), (16, 2), (4, 16)))
    count = max(length, rng.choice((rng.randint(1, 200), rng.randint(1, 3000), 64, 256, 257, 5000)))
    return replace(
        random_case(seed),
        group=group,
        length=length,
        count=count,
        capacity=count + rng.choice((0, 1, 29, 156)),
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=rng.choice((mx.float16, mx.bfloat16)),
        key_format=key_format,
        value_format=value_format,
    )


def random_prefill_case(seed: int) -> Case:
    """A case of more query rows than the kernels for decoding take, of dimensions that MLX may have no kernel for."""
    rng = random.Random(seed)
    some = 32 * rng.randint(1, 16)
    key_dim, value_dim = rng.choice(((256, 256), (256, 256), (512, 512), (192, 128), (some, 288), (160, some)))
    length = rng.choice((17, rng.randint(17, 300), rng.randint(17, 150), 128))
    case = random_case(seed)
    count = max(length, case.count)
    return replace(
        case,
        group=rng.choice((1, 2, 3, 4, 8)),
        length=length,
        count=count,
        capacity=count + rng.choice((0, 1, 29, 156)),
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=rng.choice((mx.float16, mx.bfloat16)),
        key_format=case.key_format.fit(key_dim)[0],
        value_format=case.value_format.fit(value_dim)[0],
    )


def random_mla_case(seed: int, *, max_count: int = 400) -> Case:
    """A case of absorbed MLA decode: one latent that is both keys and values, and a rope term."""
    rng = random.Random(seed)
    latent = rng.choice((256, 512))
    count = rng.randint(1, max_count)
    key_format = rng.choice([f for f in FORMATS if f.bits in (4, 8)]).fit(latent)[0]
    return Case(
        seed=seed,
        batch=rng.choice((1, 2, 3)),
        kv_heads=1,
        group=rng.choice((16, 20, 32, 64, 128)),
        length=1,
        count=count,
        capacity=count + rng.choice((0, 5, 156)),
        key_dim=latent,
        value_dim=latent,
        dtype=rng.choice((mx.float16, mx.bfloat16, mx.float32)),
        key_format=key_format,
        value_format=key_format,
        mask=rng.choice(("none", "bool", "padding", "additive")),
        rope_dim=64,
    )


def build(case: Case) -> AttentionCall:
    """The arrays of ``case``, evaluated."""
    mx.random.seed(case.seed)
    heads = case.kv_heads * case.group
    queries = mx.random.normal((case.batch, heads, case.length, case.key_dim)).astype(case.dtype)
    keys, values = _keys_values(case)
    rope = None
    if case.is_mla:
        rope_queries = 0.1 * mx.random.normal((case.batch, heads, case.length, case.rope_dim))
        rope_keys = mx.random.normal((case.batch, 1, case.capacity, case.rope_dim))
        rope = RopeTerm(rope_queries.astype(case.dtype), rope_keys.astype(case.dtype)[:, :, : case.count])
        mx.eval(rope.queries, rope.keys)
    sinks = mx.random.normal((heads,)).astype(case.dtype) if case.sinks else None
    mask = _mask(case)
    scale = case.key_dim**-0.5
    mx.eval([x for x in (queries, sinks, mask) if isinstance(x, mx.array)], *keys.parts, *values.parts)
    return check_call(queries, keys, values, scale=scale, mask=mask, sinks=sinks, rope=rope)


def expected(call: AttentionCall) -> mx.array:
    """Float32 attention over the dequantized values, on the CPU, in float32."""
    with mx.stream(mx.cpu):
        queries = call.queries.astype(mx.float32)
        exact = replace(call, queries=queries, signature=call.signature._replace(dtype=mx.float32))
        out = reference.attend(exact)
        mx.eval(out)
    return out


def relative_error(actual: mx.array, wanted: mx.array) -> float:
    """Largest error over largest magnitude; infinite where ``actual`` is not finite or has another shape."""
    if actual.shape != wanted.shape:
        return float("inf")
    with mx.stream(mx.cpu):
        error = mx.abs(actual.astype(mx.float32) - wanted)
        if not mx.isfinite(error).all().item():
            return float("inf")
        peak, worst = float(mx.abs(wanted).max()), float(error.max())
        return worst / peak if peak else worst


def check_queries_that_are_not_finite(attend: Callable[[AttentionCall], mx.array], call: AttentionCall) -> None:
    """NaN or an infinity in a query row leaves nothing finite in its own row of the output, and touches no other."""
    wanted = expected(call)
    others = mx.arange(wanted.size // wanted.shape[-1]) != 1
    for value in (mx.nan, mx.inf):
        rows = mx.flatten(call.queries, 0, 2)
        rows[1, 5] = value
        out = mx.flatten(attend(replace(call, queries=rows.reshape(call.queries.shape))), 0, 2)
        with mx.stream(mx.cpu):
            assert not mx.isfinite(out[1]).any().item(), f"{value} in a query row is lost"
            rest = [mx.where(others[:, None], x, 0) for x in (out, mx.flatten(wanted, 0, 2))]
        assert relative_error(*rest) <= TOLERANCES[call.signature.dtype]


def _keys_values(case: Case) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Keys and values as the first ``count`` positions of buffers of ``capacity`` (the rest is garbage)."""
    keys = _quantized_buffer(case, case.key_dim, case.key_format)
    if case.is_mla:
        values = keys = _slice(case, keys)
        return keys, values
    values = _quantized_buffer(case, case.value_dim, case.value_format)
    if not case.stacked or (case.key_dim, case.key_format) != (case.value_dim, case.value_format):
        return _slice(case, keys), _slice(case, values)
    buffers = stack_parts([keys.parts, values.parts])
    mx.eval(buffers)
    codes, scales = (buffer[:, :, : case.count] for buffer in buffers)
    keys, values = PackedStack(codes, scales, 2, keys.format, dim=case.key_dim, dtype=case.dtype).tensors()
    return keys, values


def _quantized_buffer(case: Case, dim: int, format: Format) -> QuantizedTensor:
    """Random rows, quantized."""
    x = mx.random.normal((case.batch, case.kv_heads, case.capacity, dim))
    if case.outliers:
        x[..., dim // 3] *= 50
    whole = quantize(x.astype(case.dtype), format)
    mx.eval(whole.parts)
    return whole


def _slice(case: Case, whole: QuantizedTensor) -> QuantizedTensor:
    return whole.map_parts(lambda part: part[:, :, : case.count])


def _mask(case: Case) -> mx.array | str | None:
    """A mask of the case's kind, of a random one of the shapes that broadcast."""
    rng = random.Random(case.seed + 1)
    if case.mask in ("none", "causal"):
        return None if case.mask == "none" else "causal"
    heads = case.kv_heads * case.group
    full = (case.batch, heads, case.length, case.count)
    if case.mask == "padding":  # left padding, another for each sequence, and causal
        padding = mx.array([rng.randint(0, case.count - 1) for _ in range(case.batch)])
        positions = mx.arange(case.count)
        return reference.causal_mask(case.length, case.count) & (positions >= padding[:, None, None, None])
    shape = [1 if rng.random() < 0.4 else n for n in full[:3]] + [case.count]
    shape = shape[rng.choice([i for i in range(3) if all(n == 1 for n in shape[:i])]) :]
    keep = mx.random.bernoulli(0.7, shape)
    if case.mask == "additive":
        return mx.where(keep, mx.random.normal(shape), -mx.inf).astype(case.dtype)
    if case.mask == "fully-masked-row":
        keep = mx.broadcast_to(keep, full) & (mx.arange(heads)[:, None, None] != rng.randrange(heads))
    return keep
