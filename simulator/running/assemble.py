"""Put a fleet together: one engine per replica that a scenario describes, each with its own pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import simpy

from calibration.common.errors import ReplayError, ScenarioError
from calibration.traces import TraceSet
from simulator.drafter_routing.choice import ManyRuns, ManySignals, compile_drafters
from simulator.drafter_routing.make import Routed, drafter_rule, in_memory, route, slots_ahead
from simulator.placement import Placement, make_placement, placed_prices, placed_replay
from simulator.placement.make import acceptance_drop
from simulator.playback.replay import Replay, SequenceTable, compile_replay
from simulator.playback.signals import RecordedSignals
from simulator.pricing.costs import Prices
from simulator.pricing.make import make_prices
from simulator.results.result import Member
from simulator.scenario.fleet import BLOCK_SIZE, EngineKeys, EngineSettings, RoundRobin
from simulator.scenario.scenario import Replica, Scenario, TraceSource
from simulator.scenario.workload import block_tokens
from simulator.serving.engine import Engine
from simulator.serving.fleet import Fleet, make_replica_policy
from simulator.serving.kv import Drafter, Job, block_bytes, chain, num_blocks
from simulator.serving.scheduler import Limits, make_order
from simulator.stopping import DrafterRecording, StoppingPolicy, make_policy, policy_signals
from simulator.stopping.make import Maker
from simulator.workload import Source

ReadTraces = Callable[[Scenario, TraceSource], TraceSet]
_TABLES = ("drafter", "stopping", "placement", "costs")
"""Tables that a replica may have of its own."""


@dataclass(frozen=True)
class ReplicaSetup:
    """One replica as the scenario describes it: the scenario that it alone would have, and what serves it."""

    name: str
    scenario: Scenario
    traces: TraceSet
    prices: Prices
    limits: Limits
    policy: StoppingPolicy | None
    placement: Placement
    replay: Replay | None
    signals: RecordedSignals | ManySignals | None
    outages: tuple[tuple[float, float], ...]
    routed: Routed | None = None


def replica_setups(
    scenario: Scenario,
    traces: TraceSet,
    sequences: SequenceTable,
    read: ReadTraces,
    given: Mapping[str, Maker] | None = None,
) -> list[ReplicaSetup]:
    """Give every replica of `scenario`: a single one named "0" where it has no ``[[replica]]``.

    `given`: stopping policies from outside that need no entry point, by name.

    Raises `CostError` or `ReplayError` where the recordings do not tell what a replica needs.
    """
    replicas = scenario.replica or (Replica(name="0"),)
    views = [_view(scenario, replica) for replica in replicas]
    sets = [traces if r.traces is None else _same(read(scenario, r.traces), sequences, r.name) for r in replicas]
    slots = sum(view.engine.max_num_seqs * r.count for view, r in zip(views, replicas, strict=True))
    replays: dict[tuple[int, str | None, int | None, float], Replay | None] = {}
    found = []
    for replica, view, own in zip(replicas, views, sets, strict=True):
        for number in range(replica.count):
            material = None if view.drafter is None else DrafterRecording(own, view.drafter.name, sequences)
            policy = make_policy(view.stopping, view.engine.max_num_seqs, material, given)
            drafter = view.drafter.name if view.drafter is not None and policy is not None else None
            longest = None if policy is None else policy.longest_draft
            key = (id(own), drafter, longest, acceptance_drop(view.placement))
            if key not in replays:
                whole = _replay(view, own, sequences, policy, drafter, slots)
                replays[key] = placed_replay(view.placement, whole, sequences.output_tokens, view.seed)
            info = None if drafter is None else own.manifest.drafter(drafter)
            prices = placed_prices(view.placement, make_prices(view, own), info)
            found.append(
                ReplicaSetup(
                    name=replica.name if replica.count == 1 else f"{replica.name}-{number}",
                    scenario=view,
                    traces=own,
                    prices=prices,
                    limits=_limits(view, own, policy, drafter, replays[key]),
                    policy=policy,
                    placement=make_placement(view.placement, view.engine.max_num_seqs, policy, prices, replays[key]),
                    replay=replays[key],
                    signals=policy_signals(view.stopping, policy, replays[key], material),
                    outages=replica.failures or (),
                )
            )
    shared: dict[tuple[int, int | None], ManyRuns] = {}
    return [_routed(one, sequences, shared) for one in found]


def _routed(
    replica: ReplicaSetup, sequences: SequenceTable, shared: dict[tuple[int, int | None], ManyRuns]
) -> ReplicaSetup:
    """Give `replica` with its drafters, where requests are routed to several; replicas share what is compiled."""
    view, policy, rule = replica.scenario, replica.policy, drafter_rule(replica.scenario)
    if rule is None or policy is None:
        return replica
    key = (id(replica.traces), policy.longest_draft)
    if key not in shared:
        shared[key] = compile_drafters(
            replica.traces,
            rule.drafters,
            sequences,
            seed=view.seed,
            longest_draft=policy.longest_draft,
            block_tokens=block_tokens(view.workload),
        )
    routed = route(view, replica.traces, sequences, policy, replica.prices, shared[key])
    limits = _limits(view, replica.traces, policy, in_memory(rule))
    return replace(
        replica,
        limits=replace(limits, lookahead_tokens=slots_ahead(rule, policy.longest_draft)),
        placement=routed.placement,
        replay=routed.replay,
        signals=routed.signals,
        routed=routed,
    )


def _view(scenario: Scenario, replica: Replica) -> Scenario:
    """Give the scenario that holds for `replica` alone."""
    keys = [*EngineKeys.model_fields, "max_num_seqs"]
    own = {key: value for key in keys if (value := getattr(replica, key)) is not None}
    tables = {key: value for key in _TABLES if (value := getattr(replica, key)) is not None}
    if replica.drafter is not None:
        tables["routing"] = None
    return scenario.model_copy(update={"engine": scenario.engine.model_copy(update=own), **tables})


def _same(traces: TraceSet, sequences: SequenceTable, replica: str) -> TraceSet:
    """Check that `traces` of a replica hold the sequences that are served, with the same lengths."""
    ids, lengths = (traces.sequences[name].to_pylist() for name in ("sequence_id", "output_tokens"))
    own = dict(zip(ids, lengths, strict=True))
    for name, tokens in zip(sequences.ids, sequences.output_tokens, strict=True):
        if own.get(name) != tokens:
            raise ReplayError(
                f"replica '{replica}': traces: must hold sequence '{name}' with {tokens} output tokens, as the "
                f"scenario's traces do, got {own.get(name, 'none')}"
            )
    return traces


def _limits(
    view: Scenario, traces: TraceSet, policy: StoppingPolicy | None, drafter: Drafter, replay: Replay | None = None
) -> Limits:
    engine: EngineSettings = view.engine
    ahead = 0 if policy is None else policy.longest_draft
    if ahead and replay is not None and replay.shapes is not None:
        ahead = replay.shapes.most(ahead)
    swap_s = None
    if engine.swap_bandwidth_gb_s is not None:
        swap_s = block_bytes(engine, traces.manifest, drafter) / (engine.swap_bandwidth_gb_s * 1e9)
    return Limits(
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        chunked_prefill=bool(engine.enable_chunked_prefill),
        long_prefill_tokens=engine.long_prefill_token_threshold,
        lookahead_tokens=ahead,
        num_blocks=num_blocks(engine, traces.manifest, drafter),
        block_size=engine.block_size or BLOCK_SIZE,
        prefix_caching=bool(engine.enable_prefix_caching),
        block_swap_s=swap_s,
    )


def _replay(
    view: Scenario,
    traces: TraceSet,
    sequences: SequenceTable,
    policy: StoppingPolicy | None,
    drafter: str | None,
    slots: int,
) -> Replay | None:
    if policy is None or drafter is None:
        return None
    return compile_replay(
        traces,
        drafter,
        sequences,
        slots=slots,
        seed=view.seed,
        longest_draft=policy.longest_draft,
        block_tokens=block_tokens(view.workload),
    )


def make_fleet(
    scenario: Scenario,
    replicas: list[ReplicaSetup],
    sequences: SequenceTable,
    source: Source,
    env: simpy.Environment,
    ended: Callable[[int], None],
) -> Fleet:
    """Start the engines of `replicas` behind a router."""
    policy = None
    if scenario.replica is not None:
        chosen = scenario.routing.replica if scenario.routing is not None else None
        policy = make_replica_policy(chosen or RoundRobin(), scenario.seed)
    fleet = Fleet(env, source, make_order(scenario.batching, sequences), policy, ended)
    recorded = source.provenance.get("lengths") == "recorded"
    for replica in replicas:
        fleet.engines.append(
            Engine(
                env,
                fleet,
                replica.prices,
                replica.limits,
                name=replica.name,
                replay=replica.replay,
                policy=replica.policy,
                placement=replica.placement,
                signals=replica.signals,
                contents=Contents(replica.limits.block_size, recorded),
                outages=replica.outages,
            )
        )
    fleet.start()
    return fleet


class Contents:
    """Keys of the KV blocks of a request: what makes two blocks equal.

    Prompts are equal as far as their prefix hashes are, or, where `recorded` prompts are served, when they belong to
    the same recorded sequence; else every prompt is its own. Blocks that reach into the output belong to their
    request alone (in a conversation, the next turn would find some of them again in a real engine).
    """

    def __init__(self, block_size: int, recorded: bool) -> None:
        self._size, self._recorded = block_size, recorded

    def __call__(self, job: Job, blocks: int) -> list[int]:
        """Give the keys of the first `blocks` full blocks of the context of `job`."""
        request, size = job.request, self._size
        if request.prefix_block_tokens % size:
            raise ScenarioError(
                f"engine.block_size: must divide the {request.prefix_block_tokens} tokens of a prefix hash, "
                f"got {size}"
            )
        prompt = min(blocks, request.prompt_tokens // size)
        if request.prefix_block_tokens:
            per_hash = request.prefix_block_tokens // size
            keys = chain(0, ((request.prefix_hashes[b // per_hash] << 20) + b % per_hash for b in range(prompt)))
        elif self._recorded:
            keys = chain((request.sequence << 2) + 1, range(prompt))
        else:
            keys = chain((request.id << 2) + 2, range(prompt))
        return keys + chain((request.id << 2) + 3, range(prompt, blocks))


def members(fleet: Fleet, replicas: list[ReplicaSetup]) -> list[Member]:
    """Give what every replica leaves behind."""
    return [
        Member(
            name=engine.name,
            log=engine.log,
            overhead_s=replica.prices.overhead_s,
            counters=engine.scheduler.counters,
            num_blocks=replica.limits.num_blocks,
            paged=replica.limits.num_blocks is not None or replica.limits.prefix_caching,
        )
        for engine, replica in zip(fleet.engines, replicas, strict=True)
    ]
