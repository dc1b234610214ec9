"""Compare scenarios on common random numbers: every replication gives all of them the same random numbers.

Arrivals, the order of requests and the random numbers of every request depend on the seed and the request alone,
never on the policy, so that replication r of A and of B differ by what the scenarios differ in. Paired differences
then vary far less than differences of independent runs.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibration.common.errors import ScenarioError
from calibration.common.files import fresh_folder
from calibration.common.progress import Progress
from calibration.traces import TraceSet
from simulator.experiments.pool import retell
from simulator.experiments.replicate import (
    CONFIDENCE,
    Estimate,
    Replications,
    check_number,
    estimate,
    gather,
    metric_names,
    replication_seeds,
    runs_table,
    warn_if_certain,
    with_seed,
    write_json,
)
from simulator.scenario.scenario import Scenario

Verdict = Literal["better", "worse", "higher", "lower", "equal", "cannot tell apart", "fixed by the load"]
METHOD = "paired replications on common random numbers, Student's t interval of the differences"
_MORE = re.compile(r"(request|output|total_token|engine_output)_throughput|request_goodput|slo_attainment(_\w+)?")
_LOAD = re.compile(r"(request|output|total_token|engine_output)_throughput|usd_per_million_output_tokens")
"""What an engine that keeps up with an open loop cannot change: it gives as much as arrives, in as much time."""
_KEEPS_UP = 0.02
"""Latency that grows by less than this, in seconds a second of arrivals, costs less than this share of throughput."""
_LESS = re.compile(r"(mean|median|p\d+)_(ttft|tpot|itl|e2el)_ms|usd_per_.*|joules_per_.*")


@dataclass(frozen=True)
class Contrast:
    """One number of two scenarios on common random numbers.

    `difference` is B - A. `ratio` is B / A: the geometric mean of the paired ratios, its interval that of their
    logarithms (None where a value is not above zero). `variance_reduction` is
    (var A + var B) / var(B - A): how many times smaller common random numbers make the variance of the difference
    than independent seeds would (None where the difference does not vary). `verdict`: on which side of zero the
    interval of the difference lies; better and worse where a number has a good end, higher and lower elsewhere; fixed
    by the load where both scenarios keep up with the same open loop, so that throughput is what arrives (and goodput
    too, where all requests meet their objectives in both).
    """

    metric: str
    a: Estimate
    b: Estimate
    difference: Estimate
    ratio: Estimate | None
    variance_reduction: float | None
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Give what is known of it."""
        found = {
            "a": self.a.to_dict(),
            "b": self.b.to_dict(),
            "difference": self.difference.to_dict(),
            "ratio": None if self.ratio is None else self.ratio.to_dict(),
            "variance_reduction": self.variance_reduction,
            "verdict": self.verdict,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Comparison:
    """The first scenario against each of the others, on the same seeds.

    `contrasts[i]` holds what run i + 1 has against run 0, by name of the number. Every interval has level 95% by
    itself; with many numbers or scenarios, one in twenty that do not differ will look as if they did.
    """

    labels: tuple[str, ...]
    runs: tuple[Replications, ...]
    contrasts: tuple[dict[str, Contrast], ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that all scenarios ran on."""
        return self.runs[0].seeds

    @property
    def table(self) -> pa.Table:
        """One row per scenario and replication: label, replication, seed, and every number of the summary."""
        keys = [
            {"scenario": label, "replication": r, "seed": seed}
            for label, run in zip(self.labels, self.runs, strict=True)
            for r, seed in enumerate(run.seeds)
        ]
        return runs_table(keys, [result for run in self.runs for result in run.results])

    def to_dict(self) -> dict[str, Any]:
        """Give what ``comparison.json`` holds."""
        return {
            "baseline": self.labels[0],
            "replications": len(self.seeds),
            "confidence": CONFIDENCE,
            "method": METHOD,
            "seeds": list(self.seeds),
            "scenarios": {label: run.scenario.hash for label, run in zip(self.labels, self.runs, strict=True)},
            "paceline_version": self.runs[0].summaries[0]["paceline_version"],
            "against_baseline": {
                label: {name: contrast.to_dict() for name, contrast in contrasts.items()}
                for label, contrasts in zip(self.labels[1:], self.contrasts, strict=True)
            },
            "provenance": {
                label: run.summaries[0]["provenance"] for label, run in zip(self.labels, self.runs, strict=True)
            },
        }

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write comparison.json, runs.parquet and every scenario to `folder`, whole or not at all."""
        target = Path(folder)
        with fresh_folder(target, "comparison.json", error=ScenarioError) as scratch:
            for index, run in enumerate(self.runs):
                text = run.scenario.to_toml(target.absolute())
                (scratch / f"scenario-{index}.toml").write_text(text, encoding="utf-8")
            write_json(scratch / "comparison.json", self.to_dict())
            pq.write_table(self.table, scratch / "runs.parquet", compression="zstd")
        return target


def compare(
    a: Scenario,
    *others: Scenario,
    replications: int = 10,
    traces: TraceSet | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> Comparison:
    """Run `a` and each of `others` on the same `replications` seeds, those of `a`, and contrast each with `a`.

    The seeds of `others` are not used. `traces` replaces the TraceSets that the scenarios name; `progress` hears
    (runs done, runs in all). Objectives and warm-up are each scenario's own; ``warmup = "auto"`` may cut the runs of
    a pair at different places, which costs precision, not truth.

    Raises `ScenarioError` for fewer than two scenarios or replications, and what `simulate` raises; warns with
    `ReplicationWarning` where nothing in a scenario is random: its differences are then certain for this one order of
    these requests, and nothing is known beyond them.
    """
    if not others:
        raise ScenarioError("compare: needs at least two scenarios, got 1")
    check_number(replications)
    scenarios = [with_seed(scenario, a.seed) for scenario in (a, *others)]
    seeds = replication_seeds(a.seed, replications)
    cells = [with_seed(scenario, seed) for seed in seeds for scenario in scenarios]
    outcomes = gather(cells, traces, workers=workers, progress=progress)
    runs = tuple(
        Replications(scenario, seeds, tuple(outcome.summary for outcome in outcomes[i :: len(scenarios)]))
        for i, scenario in enumerate(scenarios)
    )
    retell(outcomes)
    warn_if_certain(runs)
    return Comparison(_labels(scenarios), runs, tuple(contrast(runs[0], other) for other in runs[1:]))


def _labels(scenarios: list[Scenario]) -> tuple[str, ...]:
    """Give the names of the scenarios, with numbers behind those that are not unique."""
    names = [scenario.name for scenario in scenarios]
    return tuple(name if names.count(name) == 1 else f"{name} #{i + 1}" for i, name in enumerate(names))


def contrast(a: Replications, b: Replications) -> dict[str, Contrast]:
    """Contrast `b` with `a`, which ran on the same seeds, number by number, where both have it."""
    if a.seeds != b.seeds:
        raise ScenarioError("compare: replications must have run on the same seeds; they did not")
    certain = a.deterministic and b.deterministic
    fixed = _fixed_by_load(a, b)
    pairs = list(zip(a.results, b.results, strict=True))
    shared = [name for name in metric_names(a.results) if any(name in y for y in b.results)]
    found = {}
    for name in shared:
        values = [(x[name], y[name]) for x, y in pairs if name in x and name in y]
        if values:
            found[name] = _contrast(name, *np.array(values, dtype=np.float64).T, certain=certain, fixed=name in fixed)
    return found


def _fixed_by_load(a: Replications, b: Replications) -> frozenset[str]:
    """Give the numbers that the load fixes: both serve the same open loop, and latency grows in neither."""
    runs = [*a.summaries, *b.summaries]
    loads = [one.scenario.workload.model_dump() for one in (a, b)]
    growth = [run.get("latency_growth") for run in runs]
    if loads[0] != loads[1] or any(one is None or one > _KEEPS_UP for one in growth):
        return frozenset()
    names = {name for run in runs for name in run if _LOAD.fullmatch(name)}
    met = all(run.get("slo_attainment", 0.0) == 1.0 for run in runs)
    return frozenset(names | ({"request_goodput"} if met else set()))


def _contrast(name: str, a: Any, b: Any, *, certain: bool, fixed: bool) -> Contrast:
    left, right, difference = estimate(a), estimate(b), estimate(b - a)
    ratio = _ratio(a, b)
    gain = None
    if difference.sd is not None and difference.sd > 0:
        gain = float((a.var(ddof=1) + b.var(ddof=1)) / (b - a).var(ddof=1))
    verdict = "fixed by the load" if fixed else _verdict(name, difference)
    if certain:
        left, right, difference = (e.without_interval() for e in (left, right, difference))
        ratio = None if ratio is None else ratio.without_interval()
    return Contrast(
        metric=name, a=left, b=right, difference=difference, ratio=ratio, variance_reduction=gain, verdict=verdict
    )


def _ratio(a: Any, b: Any) -> Estimate | None:
    """Give the geometric mean of b / a with the interval of its logarithm; `sd` is left out."""
    if not (np.all(a > 0) and np.all(b > 0)):
        return None
    logs = estimate(np.log(b / a))
    if logs.low is None or logs.high is None:
        return Estimate(logs.n, math.exp(logs.mean))
    return Estimate(logs.n, math.exp(logs.mean), None, math.exp(logs.low), math.exp(logs.high))


def _verdict(name: str, difference: Estimate) -> Verdict:
    """Say on which side of zero the interval of B - A lies, in words that fit the number."""
    low = difference.mean if difference.low is None else difference.low
    high = difference.mean if difference.high is None else difference.high
    if low == high == 0:
        return "equal"
    if difference.n < 2 or low <= 0 <= high:
        return "cannot tell apart"
    more = low > 0
    if _MORE.fullmatch(name):
        return "better" if more else "worse"
    if _LESS.fullmatch(name):
        return "worse" if more else "better"
    return "higher" if more else "lower"
