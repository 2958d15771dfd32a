"""What the kernels with warpgroup products (``wgmma.cuh``) have in common."""

from __future__ import annotations

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.cuda.device import DeviceLimits
from qsdpa_patch.kernels.cuda.planning import Unsupported

__all__ = ["TILE", "check_warpgroup_operands"]

TILE = 64
"""Keys of a tile."""
_CAPABILITY = (9, 0)
"""``wgmma`` is an instruction of this generation only."""


def check_warpgroup_operands(sig: Signature, limits: DeviceLimits) -> None:
    """Raise :class:`Unsupported` unless the device has the products, and codes unpack into the queries' dtype."""
    if limits.capability != _CAPABILITY:
        raise Unsupported("the device has no warpgroup products: they are of compute capability 9.0")
    if sig.dtype == mx.float32:
        raise Unsupported("warpgroup products take 16-bit queries")
    for format, scale in (
        (sig.key_format, sig.key_scale_dtype),
        (sig.value_format, sig.value_scale_dtype),
    ):
        if format.is_affine and scale != sig.dtype:
            raise Unsupported(f"{scale} scales with {sig.dtype} queries: their values may be out of its range")
