"""The version of paceline that runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def paceline_version() -> str:
    """Give the installed version of paceline, ``unknown`` in a bare source tree."""
    try:
        return version("paceline")
    except PackageNotFoundError:
        return "unknown"
