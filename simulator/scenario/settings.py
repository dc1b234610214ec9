"""What every table of a scenario is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of the scenario: unknown keys are refused, values are never converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def as_table(value: Any) -> Mapping[str, Any]:
    """Give `value` of a maybe unchecked scenario where it is a table, else an empty one."""
    return value if isinstance(value, Mapping) else {}
