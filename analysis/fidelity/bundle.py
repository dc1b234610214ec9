"""Measured runs that come with the package."""

from __future__ import annotations

from pathlib import Path


def bundled_runs() -> Path:
    """Give the folder of the bundled measured runs: one sub-folder an engine, for `analysis.fidelity.validate`."""
    return Path(__file__).parent / "bundled"
