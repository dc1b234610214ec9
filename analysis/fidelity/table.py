"""The error table: predicted against measured, condition by condition, with the engine's own spread beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from analysis.fidelity.counts import Count, Split

Role = Literal["fit", "held-out"]

QUANTITIES: dict[str, tuple[str, str]] = {
    "output_throughput": ("throughput", "tokens/s"),
    "mean_tpot_ms": ("mean TPOT", "ms"),
    "p99_tpot_ms": ("p99 TPOT", "ms"),
    "mean_ttft_ms": ("mean TTFT", "ms"),
    "p99_ttft_ms": ("p99 TTFT", "ms"),
    "mean_e2el_ms": ("mean end-to-end time", "ms"),
    "spec_decode_acceptance_length": ("accepted length, bonus included", "tokens"),
    "speedup": ("speed-up over no speculation", "x"),
    "step_ms": ("time of a round", "ms"),
}
"""What is compared: the key of `vllm bench serve` (or of a published table) -> (label, unit)."""


@dataclass(frozen=True)
class Compared:
    """One quantity of one condition. `spread`: half the range of the repeats over their mean; None for one repeat."""

    name: str
    measured: float
    predicted: float
    spread: float | None = None

    @property
    def error(self) -> float:
        """Relative error of the prediction: predicted / measured - 1."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Condition:
    """One condition: what was run, and what was predicted for it.

    `source`: engine and device, one name for a whole group. `labels`: what varies (drafter, draft_tokens, batch,
    arrivals, domain, ...), as text. `notes`: what a reader must know, e.g. that a price lay outside of what was
    fitted. `counts`: acceptance, predicted and as the engine counted it; empty without speculation, and for what
    others published. `split`: whose the error of the mean end-to-end time is.
    """

    source: str
    name: str
    role: Role
    repeats: int
    compared: tuple[Compared, ...]
    labels: dict[str, str] = field(default_factory=dict)
    open_loop: bool = False
    notes: tuple[str, ...] = ()
    counts: tuple[Count, ...] = ()
    split: Split | None = None

    @property
    def speculates(self) -> bool:
        """Whether anything drafts in it; conditions without labels, of published tables, do."""
        return self.labels.get("drafter") != "none" and self.labels.get("draft_tokens") != "0"

    def of(self, name: str) -> Compared | None:
        """Give one quantity, None where it was not measured."""
        return next((one for one in self.compared if one.name == name), None)


@dataclass(frozen=True)
class Crossover:
    """The smallest batch size of `grid` at which speculation no longer pays; None where it pays at all of them.

    Speculation pays where its throughput is above that of the same batch without it. `fitted`: whether runs of role
    ``fit`` alone decide the measured one, which makes it no test.
    """

    source: str
    drafter: str
    draft_tokens: str
    grid: tuple[int, ...]
    measured: int | None
    predicted: int | None
    measured_speedups: tuple[float, ...]
    predicted_speedups: tuple[float, ...]
    fitted: bool = False

    @property
    def steps_apart(self) -> int:
        """How many grid steps lie between measured and predicted; one past the grid stands for *never*."""
        at = [
            len(self.grid) if batch is None else self.grid.index(batch) for batch in (self.measured, self.predicted)
        ]
        return abs(at[0] - at[1])


@dataclass(frozen=True)
class Source:
    """One engine on one device, or one published table: where its numbers come from, and how they were predicted.

    `kind`: ``measured`` (driven by paceline) or ``published`` (measured by others). `explained`: findings about
    missed targets, in plain words.
    """

    name: str
    title: str
    kind: Literal["measured", "published"]
    device: str
    clock: str
    fitted_on: str
    explained: tuple[str, ...] = ()
    citation: str | None = None


@dataclass(frozen=True)
class Fidelity:
    """Everything that was compared."""

    sources: tuple[Source, ...]
    conditions: tuple[Condition, ...]
    crossovers: tuple[Crossover, ...] = ()
    created: str = ""

    def held_out(self, source: str | None = None) -> tuple[Condition, ...]:
        """Give the conditions that no fit has seen, of one source or of all."""
        return tuple(c for c in self.conditions if c.role == "held-out" and source in (None, c.source))


def merged(first: Fidelity, second: Fidelity) -> Fidelity:
    """Give what both hold, dated by the younger one."""
    return Fidelity(
        first.sources + second.sources,
        first.conditions + second.conditions,
        first.crossovers + second.crossovers,
        max(first.created, second.created),
    )


@dataclass(frozen=True)
class Errors:
    """Absolute relative errors of one quantity over conditions, and the engines' own spread over the same ones."""

    name: str
    conditions: int
    median: float
    worst: float
    worst_condition: str
    bias: float
    spread: float | None


def errors_of(name: str, conditions: Iterable[Condition]) -> Errors | None:
    """Sum up the errors of quantity `name`; None where no condition has it. `bias` is the median signed error."""
    found = [(c, one) for c in conditions if (one := c.of(name)) is not None and math.isfinite(one.error)]
    if not found:
        return None
    signed = np.array([one.error for _, one in found])
    worst = int(np.argmax(np.abs(signed)))
    spreads = [one.spread for _, one in found if one.spread is not None]
    return Errors(
        name=name,
        conditions=len(found),
        median=float(np.median(np.abs(signed))),
        worst=float(np.abs(signed[worst])),
        worst_condition=f"{found[worst][0].source}: {found[worst][0].name}",
        bias=float(np.median(signed)),
        spread=float(np.median(spreads)) if spreads else None,
    )


TARGETS: dict[tuple[str, str], float] = {
    ("output_throughput", "median"): 0.03,
    ("output_throughput", "worst"): 0.10,
    ("p99_tpot_ms", "median"): 0.08,
}
"""Targets on held-out conditions of engines that were driven: (quantity, statistic) -> largest error."""


def missed(fidelity: Fidelity) -> Sequence[tuple[str, str, str, float, float]]:
    """Give (source, quantity, statistic, error, target) of every target that a driven engine misses."""
    found = []
    for source in fidelity.sources:
        for (name, statistic), limit in TARGETS.items():
            errors = errors_of(name, fidelity.held_out(source.name)) if source.kind == "measured" else None
            if errors is not None and getattr(errors, statistic) > limit:
                found.append((source.name, name, statistic, float(getattr(errors, statistic)), limit))
    return found
