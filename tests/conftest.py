"""Every test starts and ends with the patch off, default settings, no counts and no adapters of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import qsdpa_patch
from qsdpa_patch import adapter_registry
from qsdpa_patch.dispatcher import router
from qsdpa_patch.settings import DEFAULT_SETTINGS


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
