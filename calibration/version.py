"""The version of paceline that runs."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from calibration.checksums import file_sha256, joint_sha256

LIBRARIES = ("numpy", "scipy", "simpy", "pyarrow")
"""What simulations compute with, beside paceline itself."""
_DATA = ("__pycache__", "bundled")
"""Folders of a package that are not its code: recordings are told apart by their own content."""


def paceline_version() -> str:
    """Give the installed version of paceline, ``unknown`` in a bare source tree."""
    try:
        return version("paceline")
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def code_sha256(packages: tuple[str, ...] = ("calibration", "simulator")) -> str:
    """Give one sha256 for the installed code that computes results, and for the versions of what it computes with.

    An editable install changes its code and not its version. Every file of `packages` counts, tables in them too
    (some 370 files, 2 MB: 13 ms, once in a process, when first asked for).
    """
    told = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
    for package in packages:
        told |= package_files(package)
    return joint_sha256(told)


def package_files(module: str) -> dict[str, str]:
    """Give the sha256 of every file of the package or module called `module`, by name; none where it has no files."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return {}
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    files = {f"{module}/{file.relative_to(root).as_posix()}": file for root in folders for file in _files(root)}
    if not files and spec.origin is not None:
        files = {module: Path(spec.origin)}
    return {name: file_sha256(file) for name, file in files.items() if file.is_file()}


def _files(root: Path) -> list[Path]:
    return [file for file in root.rglob("*") if not set(_DATA) & set(file.relative_to(root).parts) and file.is_file()]
