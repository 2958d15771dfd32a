"""The cases of a benchmark as data, and the arrays they are run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx

from qsdpa_patch.bench.limits import Work
from qsdpa_patch.kernels.dtypes import dtype_name
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, quantize

__all__ = ["Case", "buffer_sets", "quantized_rows", "random_rows", "stock_format"]

_ROTATED_BYTES = {mx.DeviceType.cpu: 128 << 20, mx.DeviceType.gpu: 320 << 20}
"""Bytes that successive calls go through before one reads the same keys again: more than any last-level cache, since a
model's layers, too, find nothing of theirs left there by the next token."""
_MAX_SETS = 64
_TILE = 4096
"""Random rows made; longer contexts repeat them, which costs every path as much as rows that differ."""

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One shape, format and context of a suite.

    heads, kv_heads, key_dim, value_dim, query_length: of the attention call. For MLA, ``key_dim`` is the latent's
        length and ``rope_dim`` that of the rotary keys beside it.
    context: keys in the cache.
    model: name of the model that ``e2e`` runs, if it is not one made for the case. Its heads are its own.
    """

    suite: str
    batch: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    query_length: int
    context: int
    dtype: mx.Dtype
    key_format: Format
    value_format: Format
    rope_dim: int = 0
    model: str = ""

    def work(self, nbytes: int) -> Work:
        """The least that attention over keys and values of ``nbytes`` has to do."""
        pairs = self.query_length * self.context - self.query_length * (self.query_length - 1) // 2  # causal
        products = self.key_dim + self.rope_dim + self.value_dim
        return Work(nbytes, self.batch * self.heads * pairs * products)

    @property
    def label(self) -> str:
        """All but the context, in short."""
        dims = f"D{self.key_dim}" if self.key_dim == self.value_dim else f"D{self.key_dim}/{self.value_dim}"
        rope = f"+{self.rope_dim}" if self.rope_dim else ""
        formats = [str(self.key_format), str(self.value_format)]
        stored = formats[0] if formats[0] == formats[1] or self.rope_dim else f"K {formats[0]}, V {formats[1]}"
        if self.model:
            return f"{self.model}, {stored}"
        return (
            f"B{self.batch} Hq{self.heads} Hkv{self.kv_heads} {dims}{rope} L{self.query_length}, "
            f"{stored}, {dtype_name(self.dtype)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The case as plain data."""
        return {
            "suite": self.suite,
            "model": self.model or None,
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "rope_dim": self.rope_dim,
            "query_length": self.query_length,
            "context": self.context,
            "dtype": dtype_name(self.dtype),
            "key_format": str(self.key_format),
            "value_format": str(self.value_format),
        }


def random_rows(batch: int, heads: int, count: int, dim: int, dtype: mx.Dtype, *, spare: int = 256) -> mx.array:
    """Random ``[batch, heads, count, dim]``, a slice of a buffer with ``spare`` rows more, as a cache hands it out."""
    tile = mx.random.normal((batch, heads, min(count + spare, _TILE), dim)).astype(dtype)
    rows = _repeat_rows(tile, count + spare)
    mx.eval(rows)
    return rows[:, :, :count]


def quantized_rows(
    batch: int, heads: int, count: int, dim: int, dtype: mx.Dtype, format: Format, *, spare: int = 256
) -> QuantizedTensor:
    """:func:`random_rows`, quantized."""
    tile = quantize(random_rows(batch, heads, min(count + spare, _TILE), dim, dtype, spare=0), format)
    parts = [_repeat_rows(part, count + spare) for part in tile.parts]
    mx.eval(parts)
    codes, scales, *biases = (part[:, :, :count] for part in parts)
    return QuantizedTensor(codes, scales, biases[0] if biases else None, tile.format, dim=dim, dtype=dtype)


def buffer_sets(make: Callable[[], T], set_bytes: int) -> list[T]:
    """As many results of ``make`` as it takes for successive calls to find nothing in the processor's caches."""
    wanted = -(-_ROTATED_BYTES[mx.default_device().type] // max(set_bytes, 1))
    return [make() for _ in range(min(wanted, _MAX_SETS))]


def stock_format(case: Case) -> dict[str, int]:
    """The bits and group size of mlx-lm's own quantized cache for ``case``, as its functions take them.

    Raises:
        ValueError: mlx-lm has no such cache.
    """
    if case.key_format != case.value_format and not case.rope_dim:
        raise ValueError("mlx-lm quantizes keys and values alike")
    if case.key_format.rotated or not case.key_format.has_biases:
        raise ValueError(f"mlx-lm has no {case.key_format} cache")
    return {"bits": case.key_format.bits, "group_size": case.key_format.group_size}


def _repeat_rows(tile: mx.array, count: int) -> mx.array:
    """``count`` rows in a buffer of their own, ``tile``'s over and over."""
    length = tile.shape[2]
    copies = [tile] * (count // length) + ([tile[:, :, : count % length]] if count % length else [])
    return mx.concatenate(copies, axis=2) if len(copies) > 1 else mx.contiguous(copies[0], allow_col_major=False)
