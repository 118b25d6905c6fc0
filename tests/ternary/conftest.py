"""What tests of several folders of `ternary` use."""

import jaxtyping
import pytest


@pytest.fixture
def any_types(monkeypatch):
    """Without the types that the tests check, whose error would come before ours."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
