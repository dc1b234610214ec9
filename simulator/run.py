"""Run one scenario: put the pieces together, let time pass, and sum up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import simpy

from calibration.errors import ExtrapolationWarning, ScenarioError
from calibration.traces import Manifest, TraceSet, bundled
from simulator import metrics
from simulator.costs import Prices, make_prices
from simulator.engine import Engine
from simulator.loading import name_faults
from simulator.replay import DrawnRuns, Replay, SequenceTable, compile_replay, select_sequences
from simulator.result import RunResult
from simulator.scenario import Scenario
from simulator.stopping import make_policy
from simulator.workload import make_source

Progress = Callable[[int, int], None]


def simulate(scenario: Scenario, traces: TraceSet | None = None, progress: Progress | None = None) -> RunResult:
    """Run `scenario` and give its result.

    `traces` replaces the TraceSet that the scenario names; `progress` hears (counted requests ended, in all).
    Replay is exact for greedy traces and exact in distribution for sampled ones. Same scenario, same TraceSet and
    same version give the same bytes.

    Raises `ScenarioError`, `TraceError`, `ReplayError` or `CostError`; warns with `ExtrapolationWarning`, once,
    where iterations were priced outside of what was measured.
    """
    traces = traces if traces is not None else read_traces(scenario)
    _check_names(scenario, traces)
    drafter = scenario.drafter.name if scenario.drafter is not None else None
    sequences = select_sequences(traces, domains=scenario.traces.domains, drafter=drafter)
    prices = make_prices(scenario, traces)
    slots = scenario.engine.max_num_seqs
    policy = make_policy(scenario.stopping, slots)
    replay: Replay | None = None
    if policy is not None and drafter is not None:
        longest = policy.longest_draft
        replay = compile_replay(traces, drafter, sequences, slots=slots, seed=scenario.seed, longest_draft=longest)
    source = make_source(scenario, sequences)
    tally = _Tally(progress, source.counted)
    env = simpy.Environment()
    engine = Engine(env, source, prices, slots, replay=replay, policy=policy, ended=tally.add)
    env.process(engine.run())
    env.run()
    requests = metrics.requests_table(engine.log, sequences)
    iterations = metrics.iterations_table(engine.log, prices.overhead_s)
    summary: dict[str, Any] = {
        "name": scenario.name,
        **metrics.throughputs(requests, iterations),
        **metrics.latencies(engine.log, requests),
        **(metrics.acceptance(engine.log) if policy is not None else {}),
        **metrics.where_time_went(iterations),
        "iterations": iterations.num_rows,
        "extrapolated_iterations": prices.extrapolated_iterations,
        "truncated_requests": source.truncated,
        "seed": scenario.seed,
        "scenario_hash": scenario.hash,
        "paceline_version": _version(),
        "costs": prices.describe(),
        "provenance": _provenance(scenario, traces.manifest, sequences, replay, prices),
    }
    _warn(prices, iterations.num_rows)
    return RunResult(scenario, summary, requests, iterations)


def read_traces(scenario: Scenario) -> TraceSet:
    """Read the TraceSet that `scenario` names."""
    source = scenario.traces
    if source.bundled is not None:
        return bundled(source.bundled)
    if source.path is not None:
        return TraceSet.read(scenario.locate(source.path))
    raise ScenarioError("traces: must have bundled or path, or be given to simulate()")


class _Tally:
    """Adds up ended requests for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, number: int) -> None:
        self._done += number
        if self._progress is not None:
            self._progress(self._done, self._total)


def _check_names(scenario: Scenario, traces: TraceSet) -> None:
    domains = traces.sequences["domain"].unique().to_pylist()
    faults = name_faults(scenario.model_dump(), traces.manifest.drafter_names, domains)
    if faults:
        raise ScenarioError("\n".join(f"scenario: {fault}" for fault in faults))


def _warn(prices: Prices, iterations: int) -> None:
    if prices.extrapolated_iterations:
        warnings.warn(
            f"{prices.extrapolated_iterations} of {iterations} iterations were priced outside of what was "
            "measured; summary.json: costs: measured_range says what was",
            ExtrapolationWarning,
            stacklevel=3,
        )


def _provenance(
    scenario: Scenario, manifest: Manifest, sequences: SequenceTable, replay: Replay | None, prices: Prices
) -> dict[str, Any]:
    """Say where the numbers come from: which are simulated, fitted, stated, recorded or imported."""
    exactness = "none: nothing is drafted"
    if replay is not None:
        drawn = isinstance(replay, DrawnRuns)
        exactness = "exact in distribution (sampled)" if drawn else "exact (recorded run lengths)"
    fitted = prices.verify.describe()["kind"] == "fitted"
    return {
        "results": "simulated",
        "costs": "fitted to recorded timings" if fitted else "stated linear constants",
        "acceptance": manifest.kind,
        "replay": exactness,
        "verifier": manifest.verifier.name,
        "drafter": scenario.drafter.name if scenario.speculates and scenario.drafter is not None else None,
        "decoding": manifest.decoding.mode,
        "device": manifest.device.name,
        "sequences": len(sequences),
        "traces_created": manifest.created,
        "tables_sha256": {name: table.sha256 for name, table in manifest.tables.items()},
    }


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("paceline")
    except PackageNotFoundError:
        return "unknown"
