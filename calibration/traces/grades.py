"""Grades of acceptance: how close to a recording the run lengths of a TraceSet are, best first.

    recorded                     at every position, by ``paceline calibrate`` or from the text of a measured run
    imported per round           by others, each round counted (or every position listed)
    synthesised from aggregates  drawn so that counters, rates or one mean come back; no round was measured

What stands on several TraceSets has the lowest of their grades.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from calibration.traces.manifest import Grain, Manifest

Grade = Literal["recorded", "imported per round", "synthesised from aggregates"]
RECORDED: Grade = "recorded"
PER_ROUND: Grade = "imported per round"
SYNTHESISED: Grade = "synthesised from aggregates"
ACCEPTANCE_GRADES: tuple[Grade, ...] = (RECORDED, PER_ROUND, SYNTHESISED)
"""Best first."""

_FORMATS: tuple[tuple[str, Grain], ...] = (
    ("vllm per-request metrics", "histogram"),
    ("sglang per-request histograms", "histogram"),
    ("aiperf records", "histogram"),
    ("specdecode-bench", "position"),
    ("hsd-eagle3-rounds", "round"),
    ("ltd-eagle3-rounds", "round"),
)
"""How finely formats tell acceptance, by how their name begins; for manifests written before they said it."""


def grain_of(kind: str, import_format: str | None, grain: Grain | None = None) -> Grain:
    """Give how finely acceptance is told by a TraceSet of `kind`; `grain` where its manifest says so.

    Else by the import's format, at its coarsest where it has several forms; an unknown format counts as aggregates.
    """
    if kind == "recorded":
        return "position"
    if grain is not None:
        return grain
    named = import_format or ""
    return next((one for start, one in _FORMATS if named.startswith(start)), "aggregate")


def grade_of(kind: str, import_format: str | None, grain: Grain | None = None) -> Grade:
    """Give the grade of acceptance of a TraceSet of `kind`; see `grain_of`."""
    if kind == "recorded":
        return RECORDED
    return SYNTHESISED if grain_of(kind, import_format, grain) == "aggregate" else PER_ROUND


def acceptance_grade(manifest: Manifest) -> Grade:
    """Give the grade of acceptance of the TraceSet with this `manifest`."""
    return grade_of(manifest.kind, manifest.import_format, manifest.import_grain)


def lowest_grade(grades: Iterable[str]) -> Grade:
    """Give the lowest of `grades`; what is no grade counts as the lowest of all."""
    found = [ACCEPTANCE_GRADES.index(one) if one in ACCEPTANCE_GRADES else 2 for one in grades]
    return ACCEPTANCE_GRADES[max(found, default=0)]


def told_grade(provenance: Mapping[str, Any]) -> Grade:
    """Give the grade that the provenance of a result states; of an older result, that of the origin that it names."""
    stated = provenance.get("acceptance_grade")
    if stated is not None:
        return lowest_grade([str(stated)])
    kind, _, named = str(provenance.get("acceptance", "imported")).partition(": ")
    return grade_of(kind, named or None)


def replay_exactness(manifest: Manifest, drafters: Iterable[str], drawn: bool) -> str:
    """Say what replaying run lengths of `drafters` gives back exactly, and what not.

    `drawn`: acceptance is drawn from recorded probabilities, as under sampling.
    """
    grain = grain_of(manifest.kind, manifest.import_format, manifest.import_grain)
    if grain == "position":
        return "exact in distribution (sampled)" if drawn else "exact (recorded run lengths)"
    if grain == "aggregate":
        longest = {manifest.drafter(name).max_draft_tokens for name in drafters}
        length = f"drafts of {longest.pop()} tokens" if len(longest) == 1 and None not in longest else "their drafts"
        return (
            f"in mean only (exact replay of synthesised rounds): the mean accepted length with {length}, as counted, "
            "can be trusted; the spread between requests, the order of rounds and other draft lengths cannot"
        )
    order = "" if grain == "round" else " but for their order, which was drawn where it was not reported"
    return f"exact for the imported rounds at their own draft lengths{order}; an estimate at other draft lengths"


GRADE_LIMITS: dict[Grade, str] = {
    RECORDED: "recorded at every position by paceline: every draft length replays",
    PER_ROUND: (
        "imported per round: what rounds accepted was counted by others; at other draft lengths, and between the "
        "starts of rounds, run lengths are estimates"
    ),
    SYNTHESISED: (
        "synthesised from aggregates: no round was measured; the mean accepted length at the draft length that was "
        "counted can be trusted, the spread between requests, bursts of acceptance and other draft lengths cannot"
    ),
}
"""What can be trusted of acceptance of each grade, for readers."""
