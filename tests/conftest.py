"""Fixtures shared by all tests. torch is imported inside, so that the other tests do not pay for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# No test depends on how busy the machine is. CI judges a commit by the same examples every time; others look for
# more.
settings.register_profile("paceline", deadline=None)
settings.register_profile("paceline-ci", deadline=None, derandomize=True, database=None)
settings.load_profile("paceline-ci" if os.environ.get("PACELINE_CI") else "paceline")

STUDIES = Path(__file__).parent / "studies"

if TYPE_CHECKING:
    from calibration.models.load import Verifier


@pytest.fixture(scope="session")
def smollm2() -> Verifier:
    """The real verifier on the CPU in float32; downloaded and converted on the first use ever, never skipped."""
    from calibration.models.load import load_verifier

    return load_verifier("smollm2-135m", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny() -> Verifier:
    """A random four-layer verifier in float64, where rounding cannot turn a choice."""
    from tiny import tiny_verifier

    return tiny_verifier(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of `studies` are marked as such; they run with ``-m studies``."""
    for item in items:
        if item.path.is_relative_to(STUDIES):
            item.add_marker("studies")
