"""What was found of hybrid policies: a tree of frozen dataclasses without arrays, for `analysis.records`."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.bootstrap import Estimate


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

    `best`: the best fixed single drafter and length (bonus excluded), found on the same requests that it serves.
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
    """One target, what came of it, and for which policy; `met` compares the point estimate."""

    target: str
    dataset: str
    batch: int | None
    policy: str
    wanted: float
    reached: Estimate
    met: bool


@dataclass(frozen=True)
class HybridFindings:
    """All cells, the targets, and how it was done. Everything is simulated from recorded acceptance."""

    source: str
    method: str
    cells: tuple[Cell, ...]
    targets: tuple[TargetResult, ...]
    notes: tuple[str, ...]

    def cell(self, dataset: str, batch: int, pricing: str) -> Cell:
        """Give a cell; `KeyError` where there is none."""
        for cell in self.cells:
            if (cell.dataset, cell.batch, cell.pricing) == (dataset, batch, pricing):
                return cell
        raise KeyError((dataset, batch, pricing))
