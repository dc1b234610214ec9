"""Where the public measurements lie that some tests want; they are never part of the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_data(*parts: str) -> Path:
    """Path below the folder of public data; skips the test, with the reason, where it is absent."""
    root = Path(os.environ.get("PACELINE_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"public data not at hand: {'/'.join(parts)} (set PACELINE_SHARED_DATA)")
    return path
