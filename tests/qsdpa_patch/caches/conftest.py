"""Small buffers, so that short sequences of operations make them grow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qsdpa_patch.caches import packed_rows


@pytest.fixture(autouse=True, scope="package")
def small_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_rows, "STEP", 8)
        yield
