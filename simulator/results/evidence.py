"""What a result stands on: the grades of its acceptance and its step times, and which verifier on which device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibration.measured.run import MARKER, parse_manifest
from calibration.traces import Manifest
from calibration.traces.grades import Grade, acceptance_grade, lowest_grade, replay_exactness, told_grade
from simulator.hardware.devices import get_device
from simulator.pricing.costs import Prices
from simulator.pricing.grades import STEP_GRADES, StepGrade, lowest_step_grade
from simulator.scenario.costs import Roofline
from simulator.scenario.scenario import Observed, Scenario

UNKNOWN = "unknown"
NAMED = "named by the scenario's costs"
"""Marks a verifier or device that the recording does not name."""


@dataclass(frozen=True)
class Evidence:
    """What findings stand on, the lowest grades first of all: no finding is better than these.

    `step_times` is None where a result does not state it (one of an older version). `parts`: grades of the steps of
    verifier and drafter. `served`: verifier and device, and which of these the costs alone name. `costs_of`: the
    model and device that steps are priced as, where these are others.
    """

    acceptance: Grade
    step_times: str | None
    parts: dict[str, str]
    served: str
    costs_of: str | None = None

    @property
    def steps(self) -> str:
        """The grade of the step times, and those of their parts where they differ."""
        return steps_told({"step_time_grade": self.step_times, "step_time_grades": self.parts})

    @classmethod
    def of(cls, provenances: Iterable[Mapping[str, Any]]) -> Evidence:
        """Give what results with `provenances` stand on together."""
        found = list(provenances)
        lowest = lowest_told(found)
        return cls(
            lowest["acceptance_grade"],
            lowest.get("step_time_grade"),
            lowest.get("step_time_grades", {}),
            " / ".join(dict.fromkeys(verifier_on(one) for one in found)),
            " / ".join(dict.fromkeys(str(one["costs_of"]) for one in found if "costs_of" in one)) or None,
        )


def graded(manifests: Iterable[Manifest], priced: Sequence[Prices]) -> dict[str, Any]:
    """Give the grades of acceptance and of step times, the lowest of all replicas, and that of each part's steps."""
    parts: dict[str, StepGrade] = {}
    for prices in priced:
        for part, grade in prices.grades.items():
            parts[part] = lowest_step_grade((grade, parts.get(part, grade)))
    return {
        "acceptance_grade": lowest_grade(acceptance_grade(manifest) for manifest in manifests),
        "step_time_grade": lowest_step_grade(parts.values()),
        "step_time_grades": parts,
    }


def replayed(manifests: Iterable[Manifest], drafters: Sequence[str], drawn: bool) -> str:
    """Say how exact the replay of the recordings with `manifests` is; see `replay_exactness`."""
    told = dict.fromkeys(replay_exactness(manifest, drafters, drawn) for manifest in manifests)
    return "; ".join(told)


def served(scenario: Scenario, manifest: Manifest) -> dict[str, Any]:
    """Give the verifier and device of a run: those of the recording, or those of the costs where it names none.

    ``named_by_costs``: which of the two the costs name. ``costs_of``: what the steps are those of, where that is
    another model or device than the recording's.
    """
    told = {"verifier": manifest.verifier.name, "device": manifest.device.name}
    priced = priced_as(scenario)
    taken = [name for name, value in told.items() if value == UNKNOWN and priced.get(name, UNKNOWN) != UNKNOWN]
    told |= {name: priced[name] for name in taken}
    other = any(told[name] != value for name, value in priced.items())
    return {
        **told,
        **({"named_by_costs": taken} if taken else {}),
        **({"costs_of": f"{priced['verifier']} on {priced['device']}"} if other else {}),
    }


def priced_as(scenario: Scenario) -> dict[str, str]:
    """Give the verifier and the device that the verifier's costs in `scenario` name; nothing where they name none."""
    cost = scenario.costs.verifier
    if isinstance(cost, Roofline):
        several = f"{cost.tensor_parallel} x " if cost.tensor_parallel > 1 else ""
        return {"verifier": cost.model, "device": several + get_device(cost.device).name}
    if isinstance(cost, Observed):
        marker = scenario.locate(cost.runs[0]) / MARKER
        run = parse_manifest(marker.read_text(encoding="utf-8"), marker)
        return {"verifier": run.model, "device": run.device.name}
    return {}


def verifier_on(told: Mapping[str, Any]) -> str:
    """Say which verifier on which device the provenance `told` is of, and what of that the costs alone name."""
    verifier, device = str(told.get("verifier") or UNKNOWN), str(told.get("device") or UNKNOWN)
    taken = told.get("named_by_costs") or ()
    if len(taken) == 2:
        return f"{verifier} on {device} ({NAMED})"
    marks = {name: f" ({NAMED})" if name in taken else "" for name in ("verifier", "device")}
    return f"{verifier}{marks['verifier']} on {device}{marks['device']}"


def lowest_told(provenances: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Give the lowest grades that results with `provenances` state; no step times where one of them states none."""
    found = list(provenances)
    told: dict[str, Any] = {"acceptance_grade": lowest_grade(told_grade(one) for one in found)}
    stated = [grade for one in found for grade in STEP_GRADES if grade == one.get("step_time_grade")]
    if not found or len(stated) < len(found):
        return told
    parts: dict[str, StepGrade] = {}
    for one in found:
        told_parts: Mapping[str, StepGrade] = one.get("step_time_grades") or {}
        for part, grade in told_parts.items():
            parts[part] = lowest_step_grade((grade, parts.get(part, grade)))
    return told | {"step_time_grade": lowest_step_grade(stated), "step_time_grades": parts}


def steps_told(told: Mapping[str, Any]) -> str:
    """Say the grade of the step times of a result, and those of its parts where they differ."""
    lowest, parts = told.get("step_time_grade"), dict(told.get("step_time_grades") or {})
    if lowest is None:
        return "grade not stated"
    if len(set(parts.values())) < 2:
        return str(lowest)
    return f"{lowest}: {', '.join(f'{part} {grade}' for part, grade in parts.items())}"
