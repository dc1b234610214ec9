"""Hybrid policies against the best fixed draft and the oracle, on requests that they have not learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.common.bootstrap import ClusterBootstrap, Estimate, describe
from analysis.routing.served import PUBLISHED
from calibration.common.arrays import Floats
from calibration.common.errors import CalibrationError
from calibration.importers import import_specdecode_bench
from calibration.traces import TraceSet
from calibration.traces.manifest import CostConstants, LinearCost
from studies.hybrid.closed import ClosedBatches, Rounds, as_one
from studies.hybrid.findings import Cell, HybridFindings, PolicyResult
from studies.hybrid.gap import NEVER_BELOW, Question, alike, gap_statistic, judged, margins
from studies.hybrid.material import SUFFIX, complete, output_tokens, with_suffix
from studies.hybrid.rule import TunedRule
from studies.public.runs import serve, table_path

BATCHES = (1, 4, 16, 32, 64, 128)
MODEL_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)
LOOKUP_TOKENS = (1, 2, 3, 5, 7, 10, 15, 20)
"""Fixed draft lengths that the best one is chosen from."""
LONGEST = 20
PER_ROUND = "per round"
PLAIN = "plain rule"
TARGETS: tuple[tuple[str, int, float], ...] = (
    ("instructcoder", 1, 0.80),
    ("instructcoder", 32, 0.50),
    ("sharegpt", 1, 0.55),
    ("sharegpt", 32, 0.35),
    ("gsm8k", 1, 0.0),
    ("gsm8k", 32, 0.0),
)
"""Shares of the gap to be closed."""
MOST_LOST = 0.01
"""The most that a policy may lose against the best fixed draft, anywhere."""
_FOLDERS = ("specdecode-bench-simulator", "data", "llama3.1-8B")


def public_traces(
    data: Path, datasets: Sequence[str] = ("instructcoder", "sharegpt", "gsm8k")
) -> dict[str, TraceSet]:
    """Give, by dataset, the public requests whose two lists belong to one text, with a suffix lookup beside them."""
    paths = {name: table_path(data, *_FOLDERS, f"combined_{name}.jsonl") for name in datasets}
    drafters = ("eagle", "ngram", SUFFIX)
    return {name: complete(with_suffix(import_specdecode_bench([path])), drafters) for name, path in paths.items()}


def published_prices(model: str = "eagle", lookup: str = "ngram") -> CostConstants:
    """Give the published constants; the suffix lookup is priced as the n-gram lookup."""
    drafters = {model: PUBLISHED.drafters["eagle"], lookup: PUBLISHED.drafters["ngram"]}
    return PUBLISHED.model_copy(update={"drafters": drafters | {SUFFIX: PUBLISHED.drafters["ngram"]}})


def per_step(prices: CostConstants, model: str, steps: int) -> CostConstants:
    """Give `prices` with the fixed part of the model's draft spread over `steps` lock-step steps of one token each.

    A draft of `steps` tokens costs what it cost per round; a shorter one less, a longer one more.
    """
    cost = prices.drafters[model]
    if not isinstance(cost, LinearCost) or cost.charged != "per_round":
        raise CalibrationError(f"prices: drafter '{model}' must be charged per round to be spread over steps")
    spread = cost.model_copy(update={"charged": "per_step", "base_s": cost.base_s / steps})
    spread = spread.model_copy(update={"per_context_token_s": cost.per_context_token_s / steps})
    return prices.model_copy(update={"drafters": {**prices.drafters, model: spread}})


@dataclass(frozen=True)
class Roles:
    """Which drafter is the model, which the lookup of the fixed drafts and the oracle, which the one of policies."""

    model: str = "eagle"
    lookup: str = "ngram"
    better_lookup: str = SUFFIX


def evaluate_hybrid(
    traces: Mapping[str, TraceSet],
    prices: CostConstants | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    steps: Sequence[int] = (),
    roles: Roles | None = None,
    learn_from: Sequence[str] | None = None,
    seed: int = 0,
    source: str = "SpecDecode-Bench: Llama-3.1-8B-Instruct on H100 (arXiv 2601.11580)",
    progress: Callable[[str, int, int], None] | None = None,
) -> HybridFindings:
    """Simulate closed batches of every dataset in `traces`, with `prices` (the published ones) per round.

    `steps`: also with the model's fixed price spread over so many steps. Policies: ``plain rule`` (match of three,
    lookup of 20, else the model with 7), ``tuned rule`` (threshold and lengths by batch, chosen on other requests),
    ``forecast ngram`` and ``forecast suffix`` (`simulator.scenario.routing.Forecast`). Intervals: bootstrap
    over whole requests, those of a cell with the best fixed draft found on all; targets are judged together, against
    whichever fixed draft is best.
    """
    chosen = roles if roles is not None else Roles()
    prices = prices if prices is not None else published_prices()
    pricings = {PER_ROUND: prices} | {f"per step, {n}": per_step(prices, chosen.model, n) for n in steps}
    work = [(name, label, batch) for name in traces for label in pricings for batch in batches]
    cells: list[Cell] = []
    questions: list[Question] = []
    boards = {name: _Board(traces[name], chosen, learn_from, seed) for name in traces}
    for done, (name, label, batch) in enumerate(work):
        if progress:
            progress(f"{name}, {label}, batch {batch}", done, len(work))
        cell, asked = boards[name].cell(name, label, pricings[label], batch)
        cells.append(cell)
        questions += asked
    if progress:
        progress("hybrid policies", len(work), len(work))
    return HybridFindings(
        source=source,
        method=(
            "Closed batches as SpecDecode-Bench serves them: each request as a batch of equal copies, prefill "
            "included; speed-up = ratio of the means over requests of tokens per second. Simulated from recorded "
            "acceptance at stated prices. What learns was learned on other requests (five folds, equal prompts "
            f"together). Intervals: {describe(2000)}. Targets are judged by bounds that hold for all of them at "
            "once, and against the best fixed draft, whichever that is."
        ),
        cells=tuple(cells),
        targets=judged(questions),
        notes=tuple(f"{name}: {board.closed.lengths.size} requests" for name, board in boards.items()),
    )


class _Board:
    """One dataset: its rounds under fixed rules are kept, as they are the same at every price."""

    def __init__(self, traces: TraceSet, roles: Roles, learn_from: Sequence[str] | None, seed: int) -> None:
        self.roles, self.traces, self._learn_from, self._seed = roles, traces, learn_from, seed
        self.names = (roles.model, roles.lookup)
        self.closed = ClosedBatches(traces, self.names)
        self._tuned = TunedRule(ClosedBatches(traces, (roles.model, roles.better_lookup)), traces, seed)
        fixed = [(0, k) for k in MODEL_TOKENS] + [(1, k) for k in LOOKUP_TOKENS]
        self.fixed: dict[tuple[int, int], Rounds] = {which: self.closed.play(*which) for which in fixed}
        self.plain = self.closed.play(-1, 0)
        rng = np.random.default_rng(seed)
        self._bootstrap = ClusterBootstrap(["all"] * len(self.closed.lengths), rng)

    def cell(self, dataset: str, pricing: str, prices: CostConstants, batch: int) -> tuple[Cell, list[Question]]:
        """Give one cell, and the targets put to the policies that learn."""
        closed = self.closed
        base = closed.rates(self.plain, prices, batch)
        fixed = {which: closed.rates(rounds, prices, batch) for which, rounds in self.fixed.items()}
        best = max(fixed, key=lambda which: float(fixed[which].mean()))
        oracle = closed.rates(closed.oracle(prices, batch), prices, batch)
        policies = self._policies(prices, batch)
        sums = np.stack([base, fixed[best], oracle, *policies.values()], axis=1)
        found = self._bootstrap.estimates(gap_statistic, sums)
        results = tuple(PolicyResult(name, *found[2 + 3 * i : 5 + 3 * i]) for i, name in enumerate(policies))
        names = [f"{self.names[drafter]} {tokens}" for drafter, tokens in fixed]
        cell = Cell(
            dataset=dataset,
            batch=batch,
            pricing=pricing,
            requests=len(base),
            tokens=output_tokens(self.traces),
            best_drafter=self.names[best[0]],
            best_tokens=best[1],
            best=found[0],
            best_alike=alike(self._bootstrap, names, list(fixed.values())),
            oracle=found[1],
            policies=results,
        )
        questions = []
        for one in results:
            for target, wanted, reached in _asked(cell, one) if one.policy != PLAIN else ():
                rates = (base, policies[one.policy], oracle, list(fixed.values()))
                beyond = margins(self._bootstrap, *rates, target, wanted)
                questions.append(Question(target, dataset, batch, pricing, one.policy, wanted, reached, beyond))
        return cell, questions

    def _policies(self, prices: CostConstants, batch: int) -> dict[str, Floats]:
        roles = self.roles
        simple = {"policy": "context_match", "drafters": list(self.names), "lookup": roles.lookup}
        learned = {"policy": "forecast"} | (
            {} if self._learn_from is None else {"learn_from": list(self._learn_from)}
        )
        return {
            PLAIN: self._simulated(simple, prices, batch),
            "tuned rule": self._tuned.rates(prices, batch),
            f"forecast {roles.lookup}": self._simulated({**learned, "drafters": list(self.names)}, prices, batch),
            f"forecast {roles.better_lookup}": self._simulated(
                {**learned, "drafters": [roles.model, roles.better_lookup]}, prices, batch
            ),
        }

    def _simulated(self, rule: Mapping[str, Any], prices: CostConstants, batch: int) -> Floats:
        """Simulate a batch of copies as one request at its prices: the same numbers, in less time."""
        return simulated_rates(self.traces, rule, as_one(prices, batch), LONGEST, seed=self._seed)


def simulated_rates(
    traces: TraceSet, rule: Mapping[str, Any], prices: CostConstants, longest: int, *, batch: int = 1, seed: int = 0
) -> Floats:
    """Give tokens per second of each request under ``[routing] drafter`` table `rule`, in batches of copies."""
    scenario = {
        "name": f"{rule['policy']} batch {batch}",
        "seed": seed,
        "routing": {"drafter": dict(rule)},
        "stopping": {"policy": "fixed", "draft_tokens": longest},
        "engine": {"max_num_seqs": batch},
        "workload": {"kind": "closed", "concurrency": batch, "copies": batch},
        "costs": {
            "overhead_s": prices.overhead_s,
            "verifier": prices.verifier.model_dump(),
            "drafters": {name: prices.drafters[name].model_dump() for name in rule["drafters"]},
        },
    }
    served = serve(scenario, traces)
    return np.asarray((served.tokens / served.seconds)[::batch], dtype=np.float64)


def _asked(cell: Cell, result: PolicyResult) -> list[tuple[str, float, Estimate]]:
    """The targets of a policy in a cell: what they are, the value wanted, and the one that was reached."""
    found = [(NEVER_BELOW, -MOST_LOST, result.over_best)]
    return found + [
        ("share of the gap", wanted, result.gap_share)
        for dataset, batch, wanted in TARGETS
        if (dataset, batch) == (cell.dataset, cell.batch)
    ]
