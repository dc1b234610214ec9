"""Run one scenario: put the pieces together, let time pass, and sum up."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

import pyarrow as pa
import simpy

from calibration.common.errors import ExtrapolationWarning, ScenarioError
from calibration.common.progress import Progress
from calibration.common.version import paceline_version
from calibration.traces import Manifest, TraceSet, bundled
from simulator.drafter_routing.make import drafter_names, is_drawn, routing_summary
from simulator.placement.make import placement_provenance
from simulator.playback.replay import SequenceTable, select_sequences
from simulator.pricing.power import joules, modelled_joules
from simulator.results import metrics
from simulator.results.evidence import Evidence, graded, replayed, served
from simulator.results.result import Record, RunResult, iterations_table, requests_table
from simulator.running.assemble import ReplicaSetup, make_fleet, members, replica_setups
from simulator.scenario.fleet import OracleShortest
from simulator.scenario.inputs import traces_identity
from simulator.scenario.loading import name_faults
from simulator.scenario.scenario import Scenario, TraceSource
from simulator.scenario.workload import block_tokens
from simulator.serving.fleet import Fleet
from simulator.stopping import OraclePolicy, StoppingPolicy
from simulator.stopping.make import Maker
from simulator.workload import Source, make_source


def simulate(
    scenario: Scenario,
    traces: TraceSet | None = None,
    progress: Progress | None = None,
    *,
    policy: StoppingPolicy | Maker | None = None,
) -> RunResult:
    """Run `scenario` and give its result.

    `traces` replaces the TraceSet that the scenario names; `progress` hears (counted requests ended, in all).
    `policy` takes the place of the scenario's stopping policy: a policy, for one replica and one run as it may
    remember, or what makes one from (settings, max_num_seqs), such as a class. The result calls it
    ``plugin:<its class>``; see docs/plugins.md.
    Replay is exact for greedy traces and exact in distribution for sampled ones. Same scenario, same TraceSet and
    same version give the same bytes.

    Raises `ScenarioError`, `TraceError`, `ReplayError` or `CostError`; warns with `ExtrapolationWarning`, once,
    where iterations were priced outside of what was measured.
    """
    given: dict[str, Maker] | None = None
    if policy is not None:
        scenario, given = _with_policy(scenario, policy)
    inputs = scenario.inputs_sha256(without="traces")
    traces = traces if traces is not None else read_traces(scenario)
    _check_names(scenario, traces)
    sequences = select_sequences(traces, domains=scenario.traces.domains, drafter=drafter_names(scenario))
    replicas = replica_setups(scenario, traces, sequences, read_traces, given)
    source = make_source(scenario, sequences)
    tally = _Tally(progress, source.counted)
    env = simpy.Environment()
    fleet = make_fleet(scenario, replicas, sequences, source, env, tally.add)
    env.run()
    record = Record(members(fleet, replicas))
    requests, iterations = requests_table(record, sequences), iterations_table(record)
    prices = replicas[0].prices
    extrapolated = sum(replica.prices.extrapolated_iterations for replica in replicas)
    summary: dict[str, Any] = {
        "name": scenario.name,
        **metrics.service(record, requests, iterations, scenario),
        **(
            metrics.acceptance(record) | metrics.rounds(requests)
            if any(replica.policy is not None for replica in replicas)
            else {}
        ),
        **routing_summary({replica.name: replica.routed for replica in replicas}),
        **metrics.where_time_went(iterations),
        **metrics.beside(record),
        **metrics.memory(record, iterations),
        **_joules(traces, replicas, iterations),
        "iterations": iterations.num_rows,
        "extrapolated_iterations": extrapolated,
        **_signals(replicas),
        "truncated_requests": source.truncated,
        "resampled_requests": source.resampled_requests,
        "resampled_tokens": source.resampled_tokens,
        "seed": scenario.seed,
        "scenario_hash": scenario.hash,
        "paceline_version": paceline_version(),
        **_fleet(scenario, replicas, fleet, record, requests, iterations),
        "costs": prices.describe(),
        "provenance": _provenance(scenario, traces.manifest, sequences, replicas)
        | traces_identity(traces)
        | ({"inputs_sha256": inputs} if inputs else {})
        | _workload_provenance(scenario, source)
        | placement_provenance(replicas[0].scenario.placement)
        | _oracles(replicas),
    }
    _warn(extrapolated, iterations.num_rows)
    return RunResult(scenario, summary, requests, iterations)


def _with_policy(scenario: Scenario, policy: StoppingPolicy | Maker) -> tuple[Scenario, dict[str, Maker]]:
    """Give `scenario` with `policy` as its stopping policy, and what makes it."""
    if hasattr(policy, "draft_tokens") and not isinstance(policy, type):
        name, made = type(policy).__name__, cast(StoppingPolicy, policy)
        if sum(replica.count for replica in scenario.replica or ()) > 1:
            raise ScenarioError(
                f"policy: must be a class, or what makes one from (settings, max_num_seqs), for several replicas, "
                f"which remember apart, got a '{name}'"
            )
        return scenario.replace("stopping", {"policy": f"plugin:{name}"}), {name: lambda settings, slots: made}
    if not callable(policy):
        raise ScenarioError(f"policy: must have draft_tokens, or make what has it, got {type(policy).__name__}")
    name = getattr(policy, "__name__", type(policy).__name__)
    return scenario.replace("stopping", {"policy": f"plugin:{name}"}), {name: policy}


def evidence_of(scenarios: Iterable[Scenario], traces: TraceSet) -> Evidence:
    """Give what runs of `scenarios` with `traces` stand on together, without running them."""
    told = []
    for scenario in scenarios:
        sequences = select_sequences(traces, domains=scenario.traces.domains, drafter=drafter_names(scenario))
        replicas = replica_setups(scenario, traces, sequences, read_traces)
        manifests = [replica.traces.manifest for replica in replicas]
        told.append(graded(manifests, [replica.prices for replica in replicas]) | served(scenario, traces.manifest))
    return Evidence.of(told)


def _oracles(replicas: list[ReplicaSetup]) -> dict[str, str]:
    """Say what knows the future, if anything does: such results bound what an engine can do."""
    chosen = [replica.scenario for replica in replicas]
    routings = [one.routing.drafter for one in chosen if one.routing is not None]
    rules = {rule.policy for rule in routings if rule is not None}
    known = {"stopping policy"} if any(isinstance(replica.policy, OraclePolicy) for replica in replicas) else set()
    known |= {"routing to drafters"} if any(rule.startswith("oracle") for rule in rules) else set()
    known |= {"batching"} if any(isinstance(one.batching, OracleShortest) for one in chosen) else set()
    if not known:
        return {}
    return {"oracle": f"{' and '.join(sorted(known))}: knows the future; a bound, not what an engine can do"}


def _joules(traces: TraceSet, replicas: list[ReplicaSetup], iterations: pa.Table) -> dict[str, Any]:
    """Give the joules of a fleet of equal replicas: from measured power, else from that fitted for the roofline."""
    if not _alike(replicas):
        return {}
    costs = replicas[0].prices.describe()
    return joules(traces.timings, costs, iterations) or modelled_joules(costs, iterations)


def _signals(replicas: list[ReplicaSetup]) -> dict[str, int]:
    """Say how many of the drafter's signals were asked for and how many of them had to be estimated, if any were."""
    read = [replica.signals for replica in replicas if replica.signals is not None]
    if not read:
        return {}
    return {
        "signal_steps": sum(signals.steps for signals in read),
        "estimated_signal_steps": sum(signals.estimated_steps for signals in read),
    }


def read_traces(scenario: Scenario, source: TraceSource | None = None) -> TraceSet:
    """Read the TraceSet that `scenario` names, or the one that a replica of it names."""
    source = source if source is not None else scenario.traces
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


def _alike(replicas: list[ReplicaSetup]) -> bool:
    """Whether one set of prices holds for all replicas."""
    return all(replica.prices.describe() == replicas[0].prices.describe() for replica in replicas)


def _fleet(
    scenario: Scenario,
    replicas: list[ReplicaSetup],
    fleet: Fleet,
    record: Record,
    requests: pa.Table,
    iterations: pa.Table,
) -> dict[str, Any]:
    """Give what only a fleet has; prices and devices of each replica only where they differ."""
    if scenario.replica is None:
        return {}
    parts = metrics.by_replica(record, requests, iterations)
    if not _alike(replicas):
        for replica in replicas:
            parts[replica.name] |= {"device": replica.traces.manifest.device.name, "costs": replica.prices.describe()}
    return {"requeued_requests": fleet.requeued, "replicas": parts}


def _warn(extrapolated: int, iterations: int) -> None:
    if extrapolated:
        warnings.warn(
            f"{extrapolated} of {iterations} iterations were priced outside of what was "
            "measured; summary.json: costs: measured_range says what was",
            ExtrapolationWarning,
            stacklevel=3,
        )


def _provenance(
    scenario: Scenario, manifest: Manifest, sequences: SequenceTable, replicas: list[ReplicaSetup]
) -> dict[str, Any]:
    """Say where the numbers come from: which are simulated, fitted, stated, recorded or imported."""
    manifests = [replica.traces.manifest for replica in replicas]
    replays = [replica.replay for replica in replicas if replica.replay is not None]
    exactness = "none: nothing is drafted"
    if replays:
        exactness = replayed(manifests, drafter_names(scenario), any(is_drawn(replay) for replay in replays))
    return {
        "results": "simulated",
        "costs": replicas[0].prices.verify.rests_on,
        **graded(manifests, [replica.prices for replica in replicas]),
        "acceptance": manifest.kind
        if manifest.import_format is None
        else f"{manifest.kind}: {manifest.import_format}",
        "replay": exactness,
        **served(scenario, manifest),
        "drafter": ", ".join(drafter_names(scenario)) or None if scenario.speculates else None,
        "decoding": manifest.decoding.mode,
        "sequences": len(sequences),
        "traces_created": manifest.created,
    }


def _workload_provenance(scenario: Scenario, source: Source) -> dict[str, Any]:
    """Say where requests come from, and what of their acceptance is an approximation."""
    told: dict[str, Any] = {"workload": source.provenance}
    if source.resampled_requests:
        told["resampling"] = (
            f"approximation: outputs longer than their recording go on with blocks of "
            f"{block_tokens(scenario.workload)} positions of their domain"
        )
    return told
