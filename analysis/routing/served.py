"""What every request costs with every drafter: tables of simulated seconds and rounds.

At batch 1 a request's time depends on its own drafter alone, so one simulation for each drafter prices every router
that chooses by request, exactly: its time is a sum over the table. In larger batches requests wait for each other's
drafters; there every router is simulated.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.speedup.grid import EXTRAPOLATED_SHARE
from calibration.common.arrays import Floats
from calibration.common.errors import CostError, ExtrapolationWarning, ReplayError
from calibration.traces import TraceSet
from calibration.traces.manifest import CostConstants, FractionOfVerify, LinearCost
from calibration.traces.paradigms import paradigm_of

PUBLISHED = CostConstants(
    source="SpecDecode-Bench, fitted by its authors to Llama-3.1-8B on one H100, InstructCoder, batch 1 to 64",
    verifier=LinearCost(base_s=5.886e-3, per_token_s=21.0e-6, per_context_token_s=0.0393e-6),
    drafters={
        "eagle": LinearCost(base_s=2.135e-3, per_token_s=0.84e-6, per_context_token_s=0.0024e-6, charged="per_round"),
        "ngram": FractionOfVerify(fraction=0.0059),
    },
    overhead_s=1.207e-3,
)
"""Step costs of an 8B model on one H100, as published."""

CHEAP_SHARE = 0.05
"""A draft step's price as a share of a verify step where drafting is taken to be cheap."""


@dataclass(frozen=True)
class Price:
    """Where prices come from. ``label``: fitted (to timings of the TraceSet), stated or assumed; ``text``: words."""

    name: str
    label: Literal["fitted", "stated", "assumed"]
    text: str


@dataclass(frozen=True)
class Priced:
    """A price list: the ``costs`` table of a scenario, and its note."""

    note: Price
    costs: Mapping[str, Any]


def own_prices(traces: TraceSet) -> Priced:
    """Give the prices that come with `traces`: fitted to its timings, else the constants it states."""
    if traces.timings.num_rows:
        device = traces.manifest.device.name
        return Priced(Price("own", "fitted", f"the recorded step times of {device}"), {})
    if traces.manifest.costs is not None:
        return Priced(Price("own", "stated", traces.manifest.costs.source), {})
    raise CostError("traces: must hold timings or state costs, got neither; give prices")


def cheap_prices(traces: TraceSet, drafters: Sequence[str], share: float = CHEAP_SHARE) -> Priced:
    """Give prices as on a large accelerator, where drafting is cheap: an assumption, not a measurement.

    Verify steps and host time: the constants published for an 8B model on one H100 (SpecDecode-Bench). A step of a
    drafter with a model costs `share` of a verify step; a drafter without one, the published share of n-gram lookup.
    """
    verifier = PUBLISHED.verifier.model_dump()
    step = {key: value * share if isinstance(value, float) else value for key, value in verifier.items()}
    lookup = PUBLISHED.drafters["ngram"].model_dump()
    free = {d.name for d in traces.manifest.drafters if paradigm_of(d.paradigm).looks_up}
    text = f"assumed: a draft step costs {share:g} of a verify step; verify steps as published for 8B on an H100"
    return Priced(
        Price("cheap", "assumed", text),
        {
            "overhead_s": PUBLISHED.overhead_s,
            "verifier": verifier,
            "drafters": {name: lookup if name in free else step for name in drafters},
        },
    )


def cost_words(price: Price, extrapolated: float) -> str:
    """Say where costs come from, and whether more than one iteration in a hundred of a run lay outside of that."""
    beyond = ", in part extrapolated" if extrapolated > EXTRAPOLATED_SHARE else ""
    return f"{price.name}: costs {price.label}{beyond}"


@dataclass(frozen=True)
class Served:
    """One simulation, by request in the order of `RequestTable.ids`; means over replications where there are any.

    ``seconds``: engine time attributed to the request, prefill included. ``rounds_s``: what of it decodes (batch 1
    only; else NaN). ``rounds``: decode rounds.
    """

    seconds: Floats
    rounds_s: Floats
    rounds: Floats


@dataclass(frozen=True)
class RequestTable:
    """Every request with every drafter at batch 1: arrays of shape (requests, drafters), and without drafts."""

    drafters: tuple[str, ...]
    ids: tuple[str, ...]
    domains: tuple[str, ...]
    output_tokens: Floats
    seconds: Floats
    rounds_s: Floats
    rounds: Floats
    plain_s: Floats
    draft_tokens: int

    @property
    def rates(self) -> Floats:
        """Tokens per second of a request's rounds: what a bandit is paid; 0 where nothing is decoded."""
        tokens = (self.output_tokens - 1)[:, None]
        return np.where(self.rounds_s > 0, tokens / np.where(self.rounds_s > 0, self.rounds_s, 1.0), 0.0)

    def of(self, drafter: str) -> int:
        """Give the column of `drafter`."""
        return self.drafters.index(drafter)


class Server:
    """Serves the requests recorded with all of `drafters` under one price list."""

    def __init__(self, traces: TraceSet, drafters: Sequence[str], priced: Priced, *, seed: int = 0) -> None:
        from simulator.playback.replay import select_sequences

        self._traces, self._seed = traces, seed
        self.drafters = tuple(drafters)
        self.extrapolated = 0.0
        """Largest share of iterations, of any run so far, that were priced outside of what was measured."""
        self._costs = dict(priced.costs)
        if "drafters" in self._costs:
            self._costs["drafters"] = {name: priced.costs["drafters"][name] for name in self.drafters}
        table = select_sequences(traces, drafter=self.drafters)
        self.ids, self.domains = table.ids, table.domains
        self.output_tokens = np.array(table.output_tokens, dtype=np.float64)

    def serve(
        self,
        rule: Mapping[str, Any],
        stopping: Mapping[str, Any] | int,
        *,
        batch: int = 1,
        replications: int = 1,
        in_order: bool = False,
        folder: Path | None = None,
    ) -> Served:
        """Simulate every request once, in a batch kept full; shuffled anew in each replication where batch > 1.

        The same seeds, hence the same orders, for every rule: common random numbers. `in_order` keeps the order of
        the TraceSet. `stopping` as a number is a fixed draft length, 0 for none. `folder`: of paths in `rule`.
        """
        from simulator.experiments.replicate import replication_seeds

        runs = [
            self._once(rule, stopping, batch, seed, in_order, folder)
            for seed in replication_seeds(self._seed, replications)[:replications]
        ]
        return Served(*np.mean([[run.seconds, run.rounds_s, run.rounds] for run in runs], axis=0))

    def table(self, draft_tokens: int) -> RequestTable:
        """Price every request with every drafter at batch 1 and one draft length."""
        runs = [self.serve({"policy": "static", "drafter": name}, draft_tokens) for name in self.drafters]
        plain = self.serve({"policy": "static", "drafter": self.drafters[0]}, 0)
        return RequestTable(
            self.drafters,
            self.ids,
            self.domains,
            self.output_tokens,
            seconds=np.stack([run.seconds for run in runs], axis=1),
            rounds_s=np.stack([run.rounds_s for run in runs], axis=1),
            rounds=np.stack([run.rounds for run in runs], axis=1),
            plain_s=plain.seconds,
            draft_tokens=draft_tokens,
        )

    def _once(
        self,
        rule: Mapping[str, Any],
        stopping: Mapping[str, Any] | int,
        batch: int,
        seed: int,
        in_order: bool,
        folder: Path | None,
    ) -> Served:
        from simulator import Scenario, simulate

        if isinstance(stopping, int):
            stopping = {"policy": "fixed", "draft_tokens": stopping} if stopping else {"policy": "none"}
        workload: dict[str, Any] = {"kind": "closed", "concurrency": batch}
        if batch > 1:
            workload |= {"keep_full": True, "order": "trace" if in_order else "shuffled"}
        scenario = Scenario.model_validate(
            {
                "seed": seed,
                "stopping": dict(stopping),
                "engine": {"max_num_seqs": batch},
                "workload": workload,
                "costs": self._costs,
                "routing": {"drafter": {"drafters": list(self.drafters), **rule}},
            }
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExtrapolationWarning)  # `extrapolated` tells
            result = simulate(scenario.placed(folder or "."), traces=self._traces)
        outside = result.summary["extrapolated_iterations"] / max(1, result.summary["iterations"])
        self.extrapolated = max(self.extrapolated, outside)
        return self._in_order(result.requests, batch)

    def _in_order(self, requests: pa.Table, batch: int) -> Served:
        """Put counted requests in the order of the ids; each must be there exactly once."""
        counted = requests.filter(requests["counted"])
        row = pc.index_in(counted["sequence_id"], value_set=pa.array(self.ids)).to_numpy(zero_copy_only=False)
        if sorted(row.tolist()) != list(range(len(self.ids))):
            raise ReplayError(f"simulation: must serve each of {len(self.ids)} requests once, got {len(row)}")

        def column(name: str) -> Floats:
            values = np.zeros(len(self.ids))
            values[row] = counted[name].to_numpy(zero_copy_only=False)
            return values

        seconds = column("engine_seconds")
        rounds_s = column("finish_s") - column("first_token_s") if batch == 1 else np.full(len(seconds), np.nan)
        return Served(seconds, rounds_s, column("rounds"))
