"""One model after the other, for all the tests of a module."""

from __future__ import annotations

import pytest

import qsdpa_patch
from tests.architectures.subjects import BUILT, Subject, make_subject


@pytest.fixture(scope="package", params=BUILT)
def subject(request: pytest.FixtureRequest) -> Subject:
    assert not qsdpa_patch.is_enabled()
    return make_subject(request.param)
