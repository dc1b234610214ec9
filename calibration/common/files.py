"""Folders and files that appear whole or not at all, and belong to what began them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calibration.common.errors import CalibrationError, PacelineError


@contextmanager
def fresh_folder(
    folder: str | os.PathLike[str], marker: str, *, error: type[PacelineError], what: str = "result"
) -> Iterator[Path]:
    """Give a scratch folder beside `folder` to write into; it takes that place when the block ends without a fault.

    A folder that holds the file `marker`, an older `what`, is replaced; any other that is not empty is refused with
    `error`.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise error(f"{target}: must be a folder, got a file")
    if target.exists() and any(target.iterdir()) and not (target / marker).is_file():
        raise error(f"{target}: must be new, empty or an older {what} with {marker}; it holds other files")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            target.rename(old / target.name)
            scratch.rename(target)
            shutil.rmtree(old)
        else:
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to the file `path`, beside which an older one stays until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def check_identity(folder: Path, what: str, begun: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse (`CalibrationError`) to go on as `mine` in a `folder` that holds a `what` begun as something else."""
    for key in {**mine, **begun}:
        if begun.get(key) != mine.get(key):
            rule = f"holds a {what} with {key} = {begun.get(key)!r}"
            raise CalibrationError(f"{folder}: {rule}, got {mine.get(key)!r}; choose another folder")


def begin_job(folder: Path, identity: Mapping[str, Any]) -> None:
    """Begin the job `identity` in `folder`, or go on with it; ``job.json`` there says whose it is.

    `CalibrationError` where another job began it, or it holds other files.
    """
    path = folder / "job.json"
    mine = json.loads(json.dumps(identity))
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted({**mine, **begun}):
            if begun.get(key) != mine.get(key):
                rule = f"holds a job begun with {key} = {_short(begun.get(key))}, got {_short(mine.get(key))}"
                hint = "repeat its settings to go on, or delete the folder to begin anew"
                raise CalibrationError(f"{folder}: {rule}; {hint}")
        return
    if folder.exists() and any(folder.iterdir()):
        raise CalibrationError(f"{folder}: must be new or an interrupted job, it holds other files")
    write_whole(path, json.dumps(mine, indent=2) + "\n")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
