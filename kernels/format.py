"""The storage formats of quantized keys and values, as data.

A format says how a row of ``dim`` numbers is packed: codes of ``bits`` bits as one little-endian bit stream over
``uint32`` words, and one scale (and bias) for each group of ``group_size`` numbers. All but ``symmetric`` are exactly
those of :func:`mlx.core.quantize`, possibly of rows that were rotated first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from qsdpa_patch.kernels.rotation import MIN_BLOCK, block_size

__all__ = ["AFFINE_BITS", "AFFINE_GROUP_SIZES", "FLOAT_FORMATS", "HEAD_DIM_MULTIPLE", "Format"]

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
FLOAT_FORMATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Floating-point formats of MLX: ``name -> (bits, group_size)``."""
HEAD_DIM_MULTIPLE = 32
"""Rows are stored padded to a multiple of this, so that they fill whole words and groups at every bit width."""


@dataclass(frozen=True)
class Format:
    """How the rows of a tensor are quantized.

    Args:
        mode: ``"affine"`` (value = scale * code + bias), ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``.
        bits: bits of a code. Affine: 2, 3, 4, 5, 6 or 8. The other modes fix it.
        group_size: numbers that share a scale. Affine: 32, 64 or 128. The other modes fix it.
        symmetric: affine without stored biases: value = scale * (code - 2 ** (bits - 1)).
        rotated: rows are rotated before they are packed (:mod:`~qsdpa_patch.kernels.rotation`). Kernels never see it:
            the queries are rotated to match (:func:`~qsdpa_patch.kernels.attention_call.check_call`).

    Raises:
        ValueError: for a combination that MLX does not have.
    """

    mode: str = "affine"
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.mode == "affine":
            if isinstance(self.bits, bool) or self.bits not in AFFINE_BITS:
                raise ValueError(f"bits={self.bits!r} is not supported: affine formats take bits in {AFFINE_BITS}")
            if self.group_size not in AFFINE_GROUP_SIZES:
                raise ValueError(
                    f"group_size={self.group_size!r} is not supported: affine formats take group sizes in "
                    f"{AFFINE_GROUP_SIZES}"
                )
        elif self.mode in FLOAT_FORMATS:
            bits, group_size = FLOAT_FORMATS[self.mode]
            if (self.bits, self.group_size, self.symmetric) != (bits, group_size, False):
                raise ValueError(
                    f"{self.mode} has bits={bits}, group_size={group_size} and is not symmetric; given "
                    f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}. "
                    f"Format.named({self.mode!r}) fills them in"
                )
        else:
            raise ValueError(f"mode={self.mode!r} is unknown: use 'affine', {', '.join(map(repr, FLOAT_FORMATS))}")

    @classmethod
    def affine(cls, bits: int, group_size: int = 64, *, symmetric: bool = False, rotated: bool = False) -> Format:
        """The affine format of ``bits`` bits and groups of ``group_size``."""
        return cls("affine", bits, group_size, symmetric, rotated)

    @classmethod
    def named(cls, name: str, *, rotated: bool = False) -> Format:
        """The floating-point format called ``name``: ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``."""
        if name not in FLOAT_FORMATS:
            raise ValueError(f"format {name!r} is unknown: use one of {', '.join(map(repr, FLOAT_FORMATS))}")
        bits, group_size = FLOAT_FORMATS[name]
        return cls(name, bits, group_size, rotated=rotated)

    @property
    def is_affine(self) -> bool:
        return self.mode == "affine"

    @property
    def packing(self) -> Format:
        """The format without the rotation: how the rows are packed."""
        return _unrotated(self) if self.rotated else self

    @property
    def has_biases(self) -> bool:
        """Whether a bias is stored for each group."""
        return self.mode == "affine" and not self.symmetric

    def words(self, dim: int) -> int:
        """``uint32`` words of codes in a row of ``dim`` numbers (``dim`` a multiple of 32)."""
        return dim * self.bits // 32

    def groups(self, dim: int) -> int:
        """Groups, hence scales, in a row of ``dim`` numbers."""
        return dim // self.group_size

    def row_bytes(self, dim: int, scale_bytes: int = 2) -> int:
        """Bytes of one packed row: codes, scales and biases. ``scale_bytes``: of an affine scale (2 or 4)."""
        if not self.is_affine:
            scale_bytes = 1
        return self.words(dim) * 4 + self.groups(dim) * scale_bytes * (2 if self.has_biases else 1)

    @lru_cache(maxsize=256)  # noqa: B019 - formats are few, and live as long as the process
    def fit(self, dim: int) -> tuple[Format, int]:
        """The format and the stored row length for rows of ``dim`` numbers.

        The row is padded to the next multiple of 32, and an affine group size that does not divide it gives way to
        the largest that does. Rows are rotated only where their length is a multiple of 8. Returns
        ``(format, padded_dim)``; ``(self, dim)`` where nothing has to change.
        """
        if dim < 1:
            raise ValueError(f"dim={dim} is not a row length")
        padded = -(-dim // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
        rotated = self.rotated and block_size(dim) >= MIN_BLOCK
        group_size = self.group_size
        if padded % group_size:
            group_size = max(g for g in AFFINE_GROUP_SIZES if g <= group_size and padded % g == 0)
        if (group_size, rotated) == (self.group_size, self.rotated):
            return self, padded
        return replace(self, group_size=group_size, rotated=rotated), padded

    def __str__(self) -> str:
        rotated = " rotated" if self.rotated else ""
        if not self.is_affine:
            return self.mode + rotated
        return f"{self.bits}-bit g{self.group_size}" + (" symmetric" if self.symmetric else "") + rotated


@lru_cache(maxsize=256)
def _unrotated(format: Format) -> Format:
    return replace(format, rotated=False)
