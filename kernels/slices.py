"""Cutting a call into blocks of heads, so that a transient stays small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor

__all__ = ["Block", "blocks", "slice_heads", "slice_mask", "slice_rows"]


@dataclass(frozen=True)
class Block:
    """Key heads ``first`` to ``last`` of one sequence."""

    index: int
    first: int
    last: int

    @property
    def heads(self) -> int:
        return self.last - self.first

    @property
    def batch(self) -> slice:
        return slice(self.index, self.index + 1)

    def query_heads(self, group: int) -> slice:
        """The query heads that share the key heads, ``group`` to each."""
        return slice(self.first * group, self.last * group)


def blocks(signature: Signature, heads: int) -> Iterator[Block]:
    """Blocks of at most ``heads`` key heads: sequence by sequence, heads in order."""
    for index in range(signature.batch):
        for first in range(0, signature.kv_heads, heads):
            yield Block(index, first, min(first + heads, signature.kv_heads))


def slice_heads(tensor: QuantizedTensor, block: Block) -> QuantizedTensor:
    """The packed rows of ``block``."""
    return tensor.map_parts(lambda part: part[block.batch, block.first : block.last])


def slice_rows(tensor: QuantizedTensor, first: int, last: int) -> QuantizedTensor:
    """The packed rows ``first`` to ``last`` of every head."""
    if first == 0 and last == tensor.codes.shape[2]:
        return tensor
    return tensor.map_parts(lambda part: part[:, :, first:last])


def slice_mask(mask: mx.array, block: Block, group: int) -> mx.array:
    """The part of a mask of 4 dimensions that is for the query heads of ``block``; axes of size 1 stay."""
    mask = mask if mask.shape[0] == 1 else mask[block.batch]
    return mask if mask.shape[1] == 1 else mask[:, block.query_heads(group)]
