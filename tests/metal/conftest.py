"""The Metal backend as the tests see it: on the GPU of a Mac, else in the emulator, else skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from tests.metal.emulated_backend import EmulatedBackend, emulated_backend
from tests.metal.emulator import Emulator, missing_tools


@pytest.fixture
def metal() -> Iterator[EmulatedBackend]:
    """The Metal backend, on this machine's GPU or in the emulator."""
    if not mx.metal.is_available() and missing_tools():
        pytest.skip(missing_tools())
    with emulated_backend() as backend:
        yield backend


@pytest.fixture
def emulator() -> Emulator:
    """A fresh emulator; for tests of the emulator itself and of what is counted in it."""
    if missing_tools():
        pytest.skip(missing_tools())
    return Emulator()
