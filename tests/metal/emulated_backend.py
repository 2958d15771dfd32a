"""Runs the Metal backend unchanged, on kernels made by the emulator. On a Mac: on its GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import pytest

from qsdpa_patch.kernels import row_quantization
from qsdpa_patch.kernels.attention_call import AttentionCall, Signature
from qsdpa_patch.kernels.metal import backend, first_use, plan
from qsdpa_patch.kernels.metal import row_quantization as metal_row_quantization
from tests.metal import mlx_quantization
from tests.metal.emulator import Cost, Emulator

__all__ = ["EmulatedBackend", "emulated_backend", "emulated_row_quantization"]


@dataclass
class EmulatedBackend:
    """``attend`` and ``has_fused_kernel`` of the backend; ``costs`` of the launches so far (none on a GPU)."""

    costs: list[Cost] = field(default_factory=list)

    def attend(self, call: AttentionCall, keys_per_split: int = plan.KEYS_PER_SPLIT) -> mx.array:
        """``keys_per_split``: fewer than usual, to have small calls split."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "KEYS_PER_SPLIT", keys_per_split)
            return backend.attend(call)

    def has_fused_kernel(self, signature: Signature) -> tuple[bool, str]:
        return backend.has_fused_kernel(signature)


@contextmanager
def emulated_backend(*, count_instructions: bool = False) -> Iterator[EmulatedBackend]:
    """The backend with the emulator in place of ``mx.fast.metal_kernel``, where there is no GPU for Metal."""
    emulator = Emulator(count_instructions=count_instructions)
    with pytest.MonkeyPatch.context() as patch:
        if not mx.metal.is_available():
            patch.setattr(backend, "metal_kernel", emulator.metal_kernel)
            patch.setattr(backend, "is_available", lambda: (True, ""))
        _forget_kernels()
        yield EmulatedBackend(emulator.costs)
    _forget_kernels()


@contextmanager
def emulated_row_quantization() -> Iterator[list[Cost]]:
    """``quantize_rows`` by the Metal kernel, and what it is held against by MLX's own kernels, both in the emulator.

    On a Mac on its GPU. Yields the costs of the launches of our kernel so far.
    """
    with emulated_backend() as emulated, pytest.MonkeyPatch.context() as patch:
        if not mx.metal.is_available():
            patch.setattr(row_quantization, "_on_gpu", lambda: True)
            patch.setattr(row_quantization, "default_backend_name", lambda: "metal")
            patch.setattr(row_quantization, "quantize_rows_in_ops", mlx_quantization.quantize_rows)
        yield emulated.costs


def _forget_kernels() -> None:
    for cached in (
        backend.has_fused_kernel, backend._decode_kernel, backend._merge_kernel, first_use._check,
        row_quantization._plan, row_quantization.has_row_kernel, row_quantization._kernel,
        metal_row_quantization.row_kernel,
    ):  # fmt: skip
        cached.cache_clear()
