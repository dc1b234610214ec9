"""Findings as JSON and back: frozen dataclasses, checked field by field."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from calibration.errors import ReportError

T = TypeVar("T")


def to_json(record: Any) -> str:
    """Give `record`, a tree of frozen dataclasses, as JSON text; equal records give equal text."""
    return TypeAdapter(type(record)).dump_json(record, indent=1).decode() + "\n"


def from_json(kind: type[T], text: str, where: str) -> T:
    """Read what `to_json` wrote of a `kind`. Raises `ReportError` with `where` and the first field at fault."""
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as fault:
        first = fault.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or kind.__name__
        raise ReportError(f"{where}: {place}: {first['msg']}") from None
