"""Files whose sha256 is stated beside them: read once, checked, and parsed from the very bytes that were checked.

What it costs: reading the bundled TraceSets (0.8 to 2.1 MB) takes 29 to 61 ms on one CPU core, of which the sha256 of
all their tables is 1.1 to 2.4 ms, 4%.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.common.errors import PacelineError

if TYPE_CHECKING:
    import pyarrow as pa

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
