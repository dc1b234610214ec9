"""The TraceSets that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from calibration.common.errors import TraceError, did_you_mean
from calibration.traces.traceset import TraceSet

_ROOT = Path(__file__).resolve().parent.parent / "bundled"


def bundled_names() -> tuple[str, ...]:
    """Names of the bundled TraceSets, sorted."""
    return tuple(sorted(path.parent.name for path in _ROOT.glob("*/manifest.json")))


def bundled_path(name: str) -> Path:
    """Folder of the bundled TraceSet `name`; `TraceError` if there is none of that name."""
    if name not in bundled_names():
        raise TraceError(f"bundled TraceSet '{name}': not found{did_you_mean(name, bundled_names())}")
    return _ROOT / name


def bundled(name: str) -> TraceSet:
    """Read the bundled TraceSet `name`."""
    return TraceSet.read(bundled_path(name))
