"""Small buffers, so that short sequences of operations make them grow."""

from __future__ import annotations

import pytest

from qsdpa_patch.caches import packed_rows


@pytest.fixture(autouse=True, scope="session")
def small_steps() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_rows, "STEP", 8)
        yield
