"""Grades of step times: what seconds rest on, best first.

measured here          fitted to timings that were recorded with the traces
observed from outside  fitted to the steps of an engine that was driven
fitted roofline        shape and device, with efficiencies fitted to public tables
stated constants       given by somebody, or assumed; nothing here checks them
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

StepGrade = Literal["measured here", "observed from outside", "fitted roofline", "stated constants"]
MEASURED: StepGrade = "measured here"
OBSERVED: StepGrade = "observed from outside"
ROOFLINE: StepGrade = "fitted roofline"
STATED: StepGrade = "stated constants"
STEP_GRADES: tuple[StepGrade, ...] = (MEASURED, OBSERVED, ROOFLINE, STATED)
"""Best first."""


def lowest_step_grade(grades: Iterable[StepGrade]) -> StepGrade:
    """Give the lowest of `grades`."""
    return max(grades, key=STEP_GRADES.index)


STEP_LIMITS: dict[StepGrade, str] = {
    MEASURED: "fitted to timings recorded with the traces: they hold for that device and software",
    OBSERVED: "fitted to steps of an engine that was driven: they hold for that engine, device and settings",
    ROOFLINE: "of a roofline whose efficiencies were fitted to public tables: nothing was timed for this result",
    STATED: "at least in part constants that somebody stated or assumed: nothing was timed to check them",
}
"""What can be trusted of step times of each grade, for readers."""
