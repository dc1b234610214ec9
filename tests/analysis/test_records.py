"""Every question's findings have one contract: a schema version, JSON and back, and what they rest on."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil

import pytest
from capacity_made import made_capacity
from cascade_made import two_valued
from numpy.random import default_rng

import analysis
from analysis.cascade import CascadeFindings, study_cascade
from analysis.common.records import Record
from calibration.common.errors import ReportError


def kinds() -> list[type[Record]]:
    for module in pkgutil.walk_packages(analysis.__path__, "analysis."):
        importlib.import_module(module.name)
    return [kind for kind in Record.__subclasses__() if kind.__module__.startswith("analysis.")]


def test_every_question_has_a_record() -> None:
    found = {kind.__module__.split(".")[1] for kind in kinds()}
    assert found == {"capacity", "cascade", "knowledge", "laws", "routing", "size", "speedup", "tokens", "tuning"}


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_it_is_frozen_and_says_its_version(kind: type[Record]) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert isinstance(fields["schema_version"].default, int)
    assert kind.rests_on is not Record.rests_on or {"evidence", "provenance"} & set(fields), (
        "it must say what it rests on"
    )


def studied() -> CascadeFindings:
    return study_cascade(two_valued(default_rng(0), 80)[0])


@pytest.mark.parametrize("made", [made_capacity, studied])
def test_json_and_back(made: object) -> None:
    found: Record = made()  # type: ignore[operator]
    text = found.to_json()
    again = type(found).from_json(text)
    assert again == found
    assert again.to_json() == text
    assert again.rests_on
    later = json.loads(text) | {"schema_version": 99}
    with pytest.raises(ReportError, match=r"mine\.json: schema_version must be \d+, got 99"):
        type(found).from_json(json.dumps(later), "mine.json")
