"""Folders and files that appear whole or not at all, and belong to what began them.

Files whose sha256 is stated beside them: read once, checked, and parsed from the very bytes that were checked.

What it costs: reading the bundled TraceSets (0.8 to 2.1 MB) takes 29 to 61 ms on one CPU core, of which the sha256 of
all their tables is 1.1 to 2.4 ms, 4%.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.common.errors import CalibrationError, PacelineError

if TYPE_CHECKING:
    import pyarrow as pa


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


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a scratch file beside `path` to write into; it takes that place when the block ends without a fault.

    An older file stays until the new one is whole. Its name cannot be guessed, its permissions are those of any new
    file, and nothing is left of it after a fault.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a scratch folder beside `path`, which is not there yet; it takes that place as `whole_file` does."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield scratch
        scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` to the file `path`, beside which an older one stays until the new one is whole."""
    with whole_file(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


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
    # What a killed process left of a write that was not finished is nobody's.
    if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise CalibrationError(f"{folder}: must be new or an interrupted job, it holds other files")
    write_whole(path, json.dumps(mine, indent=2) + "\n")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


TABLE_SHA256 = "table_sha256"
"""Key of the JSON file beside a table of graded quality: sha256 of the bytes of the table."""
_MAGIC = b"PAR1"
"""How every Parquet file begins and ends."""


def sha256(data: bytes) -> str:
    """Give the sha256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def joint_sha256(files: Mapping[str, str]) -> str:
    """Give one sha256 for several files: over their names and their own sha256, in the order of their names."""
    return sha256(json.dumps(sorted(files.items())).encode())


def file_sha256(path: Path) -> str:
    """Give the sha256 of the file `path`, ``missing`` where there is none to be read."""
    try:
        return sha256(path.read_bytes())
    except OSError:
        return "missing"


def folder_sha256(folder: Path, files: Sequence[str]) -> str:
    """Give one sha256 for these `files` of `folder`, and no other."""
    return joint_sha256({name: file_sha256(folder / name) for name in files})


def read_checked(
    path: Path, stated: str | None, *, by: str, error: type[PacelineError], hint: str = ""
) -> tuple[bytes, str]:
    """Give the bytes of `path` and their sha256; `error` unless it is the one `stated` (by the file called `by`).

    Nothing of a damaged file is parsed. Where nothing is stated, nothing is checked.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: is missing") from None
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror})") from None
    got = sha256(data)
    if stated is not None and got != stated:
        whole = len(data) >= 12 and data.startswith(_MAGIC) and data.endswith(_MAGIC)
        if path.suffix == ".parquet" and not whole:
            raise error(f"{path}: not a readable Parquet file, truncated or damaged (got {len(data):,} bytes)")
        rule = f"must have the sha256 that {by} says, it was changed or damaged"
        raise error(f"{path}: {rule} since: says {stated[:12]}..., got {got[:12]}...{hint}")
    return data, got


def check_beside(path: Path, data: bytes, error: type[PacelineError]) -> None:
    """Refuse `data`, the bytes of the table `path`, where the JSON file beside it was written for another table."""
    beside = path.with_suffix(".json")
    try:
        told = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    stated = told.get(TABLE_SHA256) if isinstance(told, dict) else None
    if isinstance(stated, str) and sha256(data) != stated:
        rule = f"must have the sha256 that {beside.name} says, it was changed or damaged since"
        raise error(f"{path}: {rule}; after an edit on purpose remove {beside.name}, which tells how it was made")


def parse_parquet(
    data: bytes,
    path: Path,
    *,
    error: type[PacelineError],
    columns: Sequence[str] | None = None,
    verified: bool = False,
) -> pa.Table:
    """Give the Parquet table in `data`, the bytes of `path`; `error` where they hold none.

    Unless `verified`, every value is looked at for damage that Parquet itself lets pass (text that is no text).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data), columns=None if columns is None else list(columns))
        table.validate(full=not verified)
    except (pa.ArrowException, OSError) as fault:
        said = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise error(f"{path}: not a readable Parquet file, truncated or damaged ({said})") from None
    return table
