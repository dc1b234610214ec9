"""Findings as JSON and back: frozen dataclasses, checked field by field."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from calibration.common.errors import ReportError

T = TypeVar("T")


class Record:
    """What every question's findings are: a frozen dataclass with a ``schema_version`` that survives JSON.

    A class that adds, drops or redefines fields counts its ``schema_version`` up.
    """

    def to_json(self) -> str:
        """Return the findings as JSON text; equal findings give equal text."""
        return to_json(self)

    @classmethod
    def from_json(cls, text: str, where: str = "findings") -> Self:
        """Read what `to_json` wrote. Raises `ReportError` that names the first field at fault after `where`."""
        return from_json(cls, text, where)

    @property
    def rests_on(self) -> str:
        """What the findings stand on, in a line: the lowest grades of acceptance and of step times."""
        found = getattr(self, "evidence", None)
        if found is None:
            found = getattr(getattr(self, "provenance", None), "evidence", None)
        if found is None:
            return "not stated"
        return f"acceptance {found.acceptance}, step times {found.steps or 'not stated'}; {found.served}"


_VERSION = TypeAdapter(dict[str, Any])


def to_json(record: Any) -> str:
    """Give `record`, a tree of frozen dataclasses, as JSON text; equal records give equal text."""
    return TypeAdapter(type(record)).dump_json(record, indent=1).decode() + "\n"


def from_json(kind: type[T], text: str, where: str) -> T:
    """Read what `to_json` wrote of a `kind`. Raises `ReportError` with `where` and the first field at fault.

    Records of another ``schema_version`` than `kind` has are refused as such: their fields mean other things.
    """
    wanted = {field.name: field.default for field in dataclasses.fields(kind)}.get("schema_version")  # type: ignore[arg-type]
    try:
        got = _VERSION.validate_json(text).get("schema_version", wanted)
        if got != wanted:
            raise ReportError(
                f"{where}: schema_version must be {wanted}, got {got!r}: written by another version of paceline; "
                "make them again with this one"
            )
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as fault:
        first = fault.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or kind.__name__
        raise ReportError(f"{where}: {place}: {first['msg']}") from None
