"""Every test starts and ends with the patch off, default settings, no counts and no adapters of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import qsdpa_patch
from qsdpa_patch import adapter_registry
from qsdpa_patch.dispatcher import router
from qsdpa_patch.settings import DEFAULT_SETTINGS

# Some GPUs multiply float32 matrices in TF32 unless told otherwise, with errors (5e-4) beyond the tests' tolerances.
# MLX reads it at the first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("PATCH", "KERNELS", "KEY_BITS", "VALUE_BITS", "STRICT", "ROTATE", "KEEP_WINDOWS", "LOG"):
        monkeypatch.delenv(f"QSDPA_{name}", raising=False)
    yield
    qsdpa_patch.disable()
    router.update(DEFAULT_SETTINGS)
    qsdpa_patch.reset_report()
    for name in list(adapter_registry._registered):
        qsdpa_patch.unregister_adapter(name)
