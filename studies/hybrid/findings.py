"""What was found of hybrid policies: a tree of frozen dataclasses without arrays, for `analysis.common.records`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from analysis.common.bootstrap import Estimate
from analysis.common.records import Record

Verdict = Literal["met", "missed", "open"]


@dataclass(frozen=True)
class PolicyResult:
    """One policy in one cell. `over_best`: its speed over the best fixed one, less 1. `gap_share`: see `Cell`."""

    policy: str
    speedup: Estimate
    over_best: Estimate
    gap_share: Estimate


@dataclass(frozen=True)
class Cell:
    """One dataset at one batch size and one pricing of the model's drafts; speed-ups over no speculation.

    `best`: the best fixed single drafter and length (bonus excluded), found on the same requests that it serves;
    `best_alike`: the fixed drafts that may be the best, as "drafter length". Intervals are those of a fixed choice.
    `oracle`: at each position the drafter that is faster there, at its exact length; no engine can do it. A policy's
    gap share is (policy - best) / (oracle - best).
    """

    dataset: str
    batch: int
    pricing: str
    requests: int
    tokens: int
    best_drafter: str
    best_tokens: int
    best: Estimate
    best_alike: tuple[str, ...]
    oracle: Estimate
    policies: tuple[PolicyResult, ...]

    def policy(self, name: str) -> PolicyResult:
        """Give the result of a policy; `KeyError` where there is none."""
        for result in self.policies:
            if result.policy == name:
                return result
        raise KeyError(name)


@dataclass(frozen=True)
class TargetResult:
    """One target, what came of it, and for which policy.

    ``reached`` has the interval of this cell alone, against the fixed draft that came out best. ``margin``: speed-up
    beyond the target against the best fixed draft, whichever that is, with bounds that hold for all targets of the
    findings at once; ``verdict``: whether these bounds settle it.
    """

    target: str
    dataset: str
    batch: int
    pricing: str
    policy: str
    wanted: float
    reached: Estimate
    margin: Estimate
    verdict: Verdict

    @property
    def met(self) -> bool:
        """Whether the target is shown to be met."""
        return self.verdict == "met"


@dataclass(frozen=True)
class HybridFindings(Record):
    """All cells, the targets, and how it was done. Everything is simulated from recorded acceptance."""

    source: str
    method: str
    cells: tuple[Cell, ...]
    targets: tuple[TargetResult, ...]
    notes: tuple[str, ...]
    schema_version: int = 1

    @property
    def rests_on(self) -> str:
        """What the findings stand on, in a line."""
        return f"simulated from recorded acceptance: {self.source}"

    def cell(self, dataset: str, batch: int, pricing: str) -> Cell:
        """Give a cell; `KeyError` where there is none."""
        for cell in self.cells:
            if (cell.dataset, cell.batch, cell.pricing) == (dataset, batch, pricing):
                return cell
        raise KeyError((dataset, batch, pricing))
