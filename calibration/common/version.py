"""The version of paceline that runs."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from calibration.common.files import file_sha256, joint_sha256

LIBRARIES = ("numpy", "scipy", "simpy", "pyarrow")
"""What simulations compute with, beside paceline itself."""


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
    (some 370 files, 2 MB: 15 to 19 ms, once in a process, when first asked for).
    """
    told = {name: str(import_module(name).__version__) for name in LIBRARIES} | {"python": platform.python_version()}
    for package in packages:
        told |= package_files(package, without=("bundled",))  # recordings are told apart by their own content
    return joint_sha256(told)


def package_files(module: str, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Give the sha256 of every file of the package or module called `module`, by name; none where it has no files.

    Folders called as in `without` are left out.
    """
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return {}
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    files = {
        f"{module}/{file.relative_to(root).as_posix()}": file for root in folders for file in _files(root, without)
    }
    if not files and spec.origin is not None:
        files = {module: Path(spec.origin)}
    return {name: file_sha256(file) for name, file in files.items() if file.is_file()}


def _files(root: Path, without: tuple[str, ...]) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in ("__pycache__", *without)]
        yield from (Path(folder, name) for name in names)
