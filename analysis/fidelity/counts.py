"""Acceptance of a condition: what was predicted beside what the engine counted, a repeat each. Compared before time.

What an engine counts comes from its requests, else from its counters (Prometheus); accepted tokens by position from
its counters, else from the arrivals of tokens where these are its rounds (see `_by_arrivals`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.measured import MeasuredRun
from calibration.observe.prometheus import by_position, total

COUNTS: dict[str, tuple[str, str]] = {
    "drafts": ("drafts", ""),
    "drafted_tokens": ("drafted tokens", "tokens"),
    "accepted_tokens": ("accepted tokens", "tokens"),
    "accepted_at": ("accepted at position", "of all drafts"),
    "tokens_per_round": ("tokens per round, bonus included", "tokens"),
}
"""Name of a count -> (label, unit); of ``accepted_at_2`` that before the number."""
NOT_COUNTED = "not counted by the engine"
MATERIAL = 0.10
"""Relative difference from which on a count is said first of all."""

_PREFIXES = ("vllm:", "llamacpp:")
_PREDICTED = {
    "drafts": "spec_decode_num_drafts",
    "drafted_tokens": "spec_decode_draft_tokens",
    "accepted_tokens": "spec_decode_accepted_tokens",
}
_COUNTERS = {"drafts": "drafts", "drafted_tokens": "draft_tokens", "accepted_tokens": "accepted_tokens"}
_LOST_AT_ENDS = 0.05
"""Share of accepted tokens that may lie past the ends of outputs, so that they never arrived."""


@dataclass(frozen=True)
class Count:
    """One count of a condition: predicted, and counted by the engine (None: it did not), a repeat each.

    `of`: how many things a share is of, 1 for a number; None for a mean, whose chance is not told.
    """

    name: str
    predicted: float
    counted: float | None
    of: float | None = 1.0

    @property
    def label(self) -> str:
        """What it counts, in words."""
        stem, _, place = self.name.rpartition("_")
        return f"{COUNTS[stem][0]} {place}" if stem in COUNTS else COUNTS[self.name][0]

    @property
    def unit(self) -> str:
        """Its unit."""
        return COUNTS[self.name if self.name in COUNTS else self.name.rpartition("_")[0]][1]

    @property
    def error(self) -> float | None:
        """Relative error: predicted / counted - 1; infinite where none was counted; None where nothing counted."""
        if self.counted is None:
            return None
        if self.counted == 0:
            return 0.0 if self.predicted == 0 else float("inf")
        return self.predicted / self.counted - 1

    @property
    def material(self) -> bool:
        """Whether prediction and count differ by more than `MATERIAL`, and by more than counts do by chance.

        Chance: three times the square root of the larger number.
        """
        if self.counted is None or self.error is None or abs(self.error) <= MATERIAL:
            return False
        if self.of is None:
            return True
        larger = max(self.predicted, self.counted) * self.of
        return bool(abs(self.predicted - self.counted) * self.of > 3 * larger**0.5)

    @property
    def told(self) -> str:
        """Prediction and count in words: ``drafts: 107 predicted, 14 counted``."""
        counted = NOT_COUNTED if self.counted is None else f"{number(self.counted)} counted"
        return f"{self.label}: {number(self.predicted)} predicted, {counted}"


def number(value: float) -> str:
    """Give a count: whole where it is, else to three digits behind a small whole part."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def counts(run: MeasuredRun, predicted: Mapping[str, Any]) -> tuple[Count, ...]:
    """Compare the counts of a condition, those of a prediction without speculation only where the engine drafted."""
    counted = counted_by(run)
    if _PREDICTED["drafts"] not in predicted and not counted.get("drafts"):
        return ()
    found = [Count(name, float(predicted.get(key, 0)), counted.get(name)) for name, key in _PREDICTED.items()]
    rates = predicted.get("spec_decode_per_position_acceptance_rates", ())
    own = positions_by(run, counted)
    for at in range(max(len(rates), len(own or ()))):
        rate = float(rates[at]) if at < len(rates) else 0.0
        mine = None if own is None else own[at] if at < len(own) else 0.0
        found.append(Count(f"accepted_at_{at + 1}", rate, mine, of=counted.get("drafts", 1.0)))
    told = float(predicted.get("tokens_per_round", 1.0))
    return (*found, Count("tokens_per_round", told, tokens_per_round(run), of=None))


def counted_by(run: MeasuredRun) -> dict[str, float]:
    """Give drafts, drafted and accepted tokens that the engine counted, a repeat; what it did not is absent."""
    repeats = run.manifest.repeats
    found = {}
    for name, counter in _COUNTERS.items():
        column = run.requests[name]
        if column.null_count < run.requests.num_rows:
            found[name] = float(pc.sum(column).as_py()) / repeats
            continue
        values = (total(run.manifest.counters, f"{p}spec_decode_num_{counter}_total") for p in _PREFIXES)
        told = next((value for value in values if value is not None), None)
        if told is not None:
            found[name] = told / repeats
    return found


def positions_by(run: MeasuredRun, counted: Mapping[str, float]) -> list[float] | None:
    """Give the share of drafts whose token at position 1, 2, .. was accepted; None where that was not counted."""
    drafts = counted.get("drafts")
    if not drafts:
        return None
    for prefix in _PREFIXES:
        kept = by_position(run.manifest.counters, f"{prefix}spec_decode_num_accepted_tokens_per_pos_total")
        if kept is not None:
            return [value / run.manifest.repeats / drafts for value in kept]
    accepted = _by_arrivals(run.requests, counted.get("accepted_tokens", 0.0) * run.manifest.repeats)
    if accepted is None:
        return None
    longest = int(accepted.max(initial=0))
    return [float((accepted >= at).sum()) / run.manifest.repeats / drafts for at in range(1, longest + 1)]


def _by_arrivals(requests: pa.Table, accepted: float) -> np.ndarray | None:
    """Give the tokens that every round accepted, as they arrived; None where arrivals are not rounds.

    They are where the tokens beyond the first of every arrival are those that the engine counted as accepted, up to
    what last rounds accepted past the ends of their outputs.
    """
    arrivals = [row for row in requests["emitted"].to_pylist() if row]
    if len(arrivals) < requests.num_rows:
        return None
    rounds = np.array([tokens - 1 for row in arrivals for tokens in row[1:]], dtype=np.int64)
    return rounds if 0 <= accepted - rounds.sum() <= _LOST_AT_ENDS * max(accepted, 1.0) else None


def tokens_per_round(run: MeasuredRun) -> float | None:
    """Give the tokens that a round of a sequence emitted, bonus included, rounds without a draft too.

    From the steps of rounds alone where steps were seen; else from the requests: (output - 1) tokens of each came
    from rounds, and each round gave what it accepted and one more. None where accepted tokens were not counted.
    """
    rounds = run.steps.filter(pc.equal(run.steps["operation"], "decode"))
    slots = float(pc.sum(rounds["sequences"]).as_py() or 0)
    if slots:
        return float(pc.sum(rounds["emitted_tokens"]).as_py()) / slots
    accepted = counted_by(run).get("accepted_tokens")
    if accepted is None:
        return None
    emitted = (float(pc.sum(run.requests["output_tokens"]).as_py()) - run.requests.num_rows) / run.manifest.repeats
    return emitted / (emitted - accepted) if emitted > accepted else None


def disagreements(found: Sequence[tuple[str, tuple[Count, ...]]]) -> list[str]:
    """Give a line for each of `found` (condition, counts) whose counts differ materially, the largest first."""
    lines = []
    for name, several in found:
        late = [one for one in several if one.material]
        if late:
            worst = max(_size(one) for one in late)
            lines.append((worst, f"{'; '.join(one.told for one in late)} ({name})"))
    return [line for _, line in sorted(lines, key=lambda pair: -pair[0])]


def _size(one: Count) -> float:
    """Give how far apart prediction and count are, as a ratio above 1."""
    low, high = sorted((one.predicted, one.counted or 0.0))
    return high / low if low > 0 else float("inf")
