"""What tables of settings are made of: the strict table, and the kinds of numbers in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Inside = Annotated[float, Field(gt=0, lt=1)]
"""A fraction that is neither 0 nor 1."""


class Table(BaseModel):
    """A table with no keys but its own and no value of another type; it does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def as_tuple(value: Any) -> Any:
    """Take a TOML list where a model has a tuple (pydantic's strict mode would not)."""
    return tuple(value) if isinstance(value, list) else value


FromList = BeforeValidator(as_tuple)
"""``Annotated[tuple[int, ...], FromList]``: a tuple that a TOML list can fill."""


def as_table(value: Any) -> Mapping[str, Any]:
    """Give `value` of a maybe unchecked file where it is a table, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def replaced(base: Any, point: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy of `base` with the values of `point` under their dotted keys."""
    data = copy.deepcopy(dict(base))
    for key, value in point.items():
        *tables, last = key.split(".")
        here = data
        for table in tables:
            inner = here.get(table)
            if not isinstance(inner, dict):
                here[table] = inner = {}
            here = inner
        here[last] = copy.deepcopy(value)
    return data
