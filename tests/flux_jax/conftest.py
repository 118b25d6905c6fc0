"""Fixtures of the pipeline's tests."""

from __future__ import annotations

import pytest

from flux_jax.pipeline import FluxPipeline
from tests.small_pipeline import small_pipeline


@pytest.fixture(scope="session")
def pipe() -> FluxPipeline:
    """One for the tests that leave it as it is."""
    return small_pipeline()
