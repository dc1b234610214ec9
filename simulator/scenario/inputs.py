"""What a scenario reads: every key that names a file or a folder, found by its type, and the content of each.

A key that names a place has the type `InputFile`, `TraceFolder`, `BundledTraces` or `RunFolder`. Hashes, rewritten
paths and the keys of stores go by that mark, whatever the key is called.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Self

from pydantic import BaseModel, PrivateAttr

from calibration.common.files import file_sha256, folder_sha256
from calibration.common.settings import Table
from calibration.common.toml import dumps
from calibration.measured.run import FILES as RUN_FILES
from calibration.traces import TraceSet, bundled_path
from calibration.traces.traceset import FILES as TRACE_FILES

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Input:
    """Marks a key that names a file, or a folder of which `files` are read; `bundled`: by name, not by path."""

    files: tuple[str, ...] = ()
    bundled: bool = False

    def sha256(self, place: Path) -> str:
        """Give the sha256 of what lies at `place`."""
        return folder_sha256(place, self.files) if self.files else file_sha256(place)


Known = dict[tuple[Path, Input], str]
"""sha256 of what was read, by its place and how it is read."""
InputFile = Annotated[str, Input()]
TraceFolder = Annotated[str, Input(TRACE_FILES)]
BundledTraces = Annotated[str, Input(TRACE_FILES, bundled=True)]
RunFolder = Annotated[str, Input(RUN_FILES)]


class Placed(Table):
    """A whole scenario, with the folder that its relative paths are relative to."""

    _folder: Path = PrivateAttr(default=Path())

    def locate(self, path: str) -> Path:
        """Give the place of a path written in the scenario."""
        return self._folder / path

    def placed(self, folder: str | os.PathLike[str]) -> Self:
        """Give the same scenario with its relative paths meant relative to `folder`."""
        copy = self.model_copy()
        copy._folder = Path(folder)
        return copy

    @property
    def hash(self) -> str:
        """sha256 of every setting, defaults included; of paths only the last part, so that folders may move.

        What lies at the paths is not in it: see `inputs_sha256`.
        """
        data = _with_paths(self, lambda path: PurePath(path).name)
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_toml(self, folder: str | os.PathLike[str] | None = None) -> str:
        """Give it as TOML, defaults filled in; relative paths are rewritten to start from `folder`."""

        def moved(path: str) -> str:
            if folder is None or Path(path).is_absolute():
                return path
            return Path(os.path.relpath(self._folder / path, folder)).as_posix()

        return dumps(_with_paths(self, moved))

    def inputs_sha256(self, *, without: str | None = None, known: Known | None = None) -> dict[str, str]:
        """Give the sha256 of the content of everything that it names, by place (``costs.verifier.runs[0]``).

        Of a TraceSet or a measured run: of all the files of it that are read. `without`: a table left out, because
        what it names is replaced. ``missing`` stands for what is not there. `known` keeps what was read, for other
        scenarios that name the same.
        """
        known = {} if known is None else known
        found = {}
        for key, value, mark in inputs_of(self):
            if key[0] != without:
                place = bundled_path(value) if mark.bundled else self._folder / value
                if (place, mark) not in known:
                    known[place, mark] = mark.sha256(place)
                found[_name(key)] = known[place, mark]
        return found


def inputs_of(section: BaseModel, key: Key = ()) -> Iterator[tuple[Key, str, Input]]:
    """Give (place, value, mark) of every key of `section`, at any depth, whose type says that it names a place."""
    for name, mark in _marks(type(section)).items():
        yield from _in(getattr(section, name), (*key, name), mark)


@functools.cache
def _marks(model: type[BaseModel]) -> dict[str, Input | None]:
    found = {}
    for name, info in model.model_fields.items():
        own = [mark for mark in info.metadata if isinstance(mark, Input)]
        found[name] = own[0] if own else mark_of(info.annotation)
    return found


def mark_of(annotation: Any) -> Input | None:
    """Give the mark inside a type: itself, in a union, or of what a collection holds; that of a table is its own."""
    if typing.get_origin(annotation) is Annotated:
        for mark in annotation.__metadata__:
            if isinstance(mark, Input):
                return mark
    return next((mark for one in typing.get_args(annotation) if (mark := mark_of(one)) is not None), None)


def _in(value: Any, key: Key, mark: Input | None) -> Iterator[tuple[Key, str, Input]]:
    if isinstance(value, BaseModel):
        yield from inputs_of(value, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _in(item, (*key, name), mark)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _in(item, (*key, number), mark)
    elif isinstance(value, str) and mark is not None:
        yield key, value, mark


def _with_paths(scenario: BaseModel, change: Callable[[str], str]) -> dict[str, Any]:
    """Give `scenario` as plain tables, with every path in it changed; names of bundled sets are no paths."""
    data = scenario.model_dump(mode="json", exclude_none=True)
    for key, value, mark in inputs_of(scenario):
        if not mark.bundled:
            here: Any = data
            for part in key[:-1]:
                here = here[part]
            here[key[-1]] = change(value)
    return data


def _name(key: Key) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def traces_identity(traces: TraceSet) -> dict[str, Any]:
    """Say which recording it was, by content, and what of it is not as it was written or cannot be known to be."""
    doubts = {"unverified_tables": traces.unverified, "edited_tables": traces.manifest.edited}
    return {
        "traces_sha256": traces.sha256,
        "tables_sha256": traces.tables_sha256,
        **{key: list(names) for key, names in doubts.items() if names},
    }
