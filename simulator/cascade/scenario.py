"""A cascade scenario: stages, traffic, who stops where and how a request is handed on, as one strict TOML file.

The tables of a cascade scenario: items, policy, hand-over, stages and objectives.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from calibration.common.errors import ScenarioError, did_you_mean
from calibration.common.settings import Count, Positive, Seconds, Table
from calibration.common.toml import read_toml, sentences
from simulator.scenario.fleet import Batching, EngineSettings, ReplicaRouting, Routing
from simulator.scenario.inputs import InputFile, Placed
from simulator.scenario.scenario import Costs, DrafterChoice, Replica, Scenario, TraceSource, cross_faults
from simulator.scenario.stopping import NoSpeculation, Stopping
from simulator.scenario.workload import ClosedLoop, GammaArrivals, PiecewiseArrivals, PoissonArrivals

CascadeWorkload = Annotated[
    ClosedLoop | PoissonArrivals | GammaArrivals | PiecewiseArrivals, Field(discriminator="kind")
]


class Items(Table):
    """The table of items: a CSV file, relative to the scenario file.

    A row per item and stage: item, domain, stage, correct (0..1), and as many more columns as it likes:
    ``item_prompt_tokens`` (or `prompt_tokens` here, for all of them), ``output_tokens`` (or that of each stage),
    ``cost`` in a unit of its own, and signals. Requests take the items in turn, as the workload says.
    """

    path: InputFile | None = None
    prompt_tokens: Count | None = None


class Always(Table):
    """Every request goes to `stage`, and to no other."""

    kind: Literal["always"]
    stage: str


class Threshold(Table):
    """Stages in order; a request stops at the first whose `signal` is at least `threshold` (or at most it).

    `threshold`: one number, or one for each stage but the last, which always answers.
    """

    kind: Literal["threshold"]
    signal: str = "confidence"
    threshold: float | Annotated[tuple[float, ...], Field(min_length=1, strict=False)]
    stop: Literal["at_least", "at_most"] = "at_least"


class Assigned(Table):
    """The stages that each item runs, from a CSV file with the columns item and stages: ``small;large``.

    The last of them answers. Any policy can be written so, as correctness and signals of an item do not change.
    """

    kind: Literal["assigned"]
    path: InputFile


Policy = Annotated[Always | Threshold | Assigned, Field(discriminator="kind")]


class Recompute(Table):
    """The next stage reads the prompt anew; what came before is discarded, and moving the text takes no time."""

    kind: Literal["recompute"] = "recompute"


class KvHandover(Table):
    """Keys and values of the prompt go to the next stage over a link, in place of its prefill.

    Seconds = bytes / bandwidth + latency; bytes = prompt tokens * the smaller ``bytes_per_token`` of the two stages.
    1e9 bytes a second are 1 GB/s. Every transfer has the whole link, and neither side's KV memory is held during it:
    optimistic on a link that is short of room. The next stage still computes one token, the prompt's last, as vLLM
    does for KV that comes from elsewhere: the first token of its answer needs it.

    Exact where both stages run the same weights over the layers they share (exits of one model, or one model under
    two policies): recomputing would give the same keys and values. Stages therefore name a ``format``, and others
    are refused. A deeper stage has layers that the shallower one never ran: with `hidden_bytes_per_token` the
    states at the shallower exit go along (added to the bytes), and the deeper one computes its own layers for the
    prompt. That is priced as a prefill of ceil(prompt * (1 - shared layers / its layers)) tokens behind the others,
    the same multiply-adds in the layers but an approximation of their time. What a drafter of the next stage would
    read of the prompt is left out.
    """

    kind: Literal["kv"]
    bandwidth_gb_s: Positive
    latency_s: Seconds = 0.0
    hidden_bytes_per_token: Positive | None = None


Handover = Annotated[Recompute | KvHandover, Field(discriminator="kind")]


class StageKv(Table):
    """Whose keys and values a stage has: `format` names the weights, of which it runs the first `layers`.

    `bytes_per_token`: 2 * layers * KV heads * head size * bytes of the dtype.
    """

    format: str
    layers: Count
    bytes_per_token: Positive


class Stage(Table):
    """One stage: `replicas` equal engines with prices of their own, which may speculate.

    Tables mean what they mean in a scenario. Of its TraceSet a stage that drafts nothing uses only the prices left
    out, and the memory of its device. `routing` chooses among its replicas. `usd_per_hour` is what one of them costs.
    """

    name: str
    replicas: Count = 1
    output_tokens: Count | None = None
    traces: TraceSource | None = None
    drafter: DrafterChoice | None = None
    stopping: Stopping = NoSpeculation()
    engine: EngineSettings = EngineSettings()
    costs: Costs = Costs()
    batching: Batching | None = None
    routing: ReplicaRouting | None = None
    kv: StageKv | None = None
    usd_per_hour: Positive | None = None


class AnswerObjectives(Table):
    """Objectives for every single answer, in ms after the request came, waiting at all stages included.

    `ttft_ms`: the first token of the final answer, `e2el_ms`: its last one.
    """

    ttft_ms: Positive | None = None
    e2el_ms: Positive | None = None


class CascadeScenario(Placed):
    """One simulation of a cascade, complete: same scenario, same files, same version, same bytes."""

    name: str = "unnamed"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    traces: TraceSource = TraceSource()
    items: Items = Items()
    workload: CascadeWorkload
    policy: Policy
    handover: Handover = Recompute()
    slo: AnswerObjectives | None = None
    stage: Annotated[tuple[Stage, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        faults = [*_stage_faults(self), *_policy_faults(self), *_kv_faults(self)]
        if self.workload.lengths is not None:
            faults.append("workload.lengths: must be left out: lengths are those of the items")
        if self.slo is not None and self.slo.ttft_ms is None and self.slo.e2el_ms is None:
            faults.append("slo: must state at least one of ttft_ms, e2el_ms")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order."""
        return tuple(stage.name for stage in self.stage)

    def of_stage(self, stage: Stage) -> Scenario:
        """Give the scenario that holds for `stage` alone, serving the whole workload."""
        return Scenario.model_validate(self._stage_tables(stage)).placed(self._folder)

    def _stage_tables(self, stage: Stage) -> dict[str, Any]:
        """Give the tables of the scenario of one stage."""
        return {
            "name": f"{self.name}: {stage.name}",
            "seed": self.seed,
            "traces": stage.traces or self.traces,
            "drafter": stage.drafter,
            "stopping": stage.stopping,
            "engine": stage.engine,
            "workload": self.workload,
            "costs": stage.costs,
            "batching": stage.batching,
            "routing": None if stage.routing is None else Routing(replica=stage.routing),
            "replica": (Replica(name=stage.name, count=stage.replicas),),
        }


def load_cascade(path: str | os.PathLike[str]) -> CascadeScenario:
    """Read the cascade scenario in the TOML file at `path`; `ScenarioError` names every fault with its place."""
    return parse_cascade(read_toml(path, ScenarioError), where=str(path), folder=Path(path).parent)


def parse_cascade(
    data: Mapping[str, Any], *, where: str = "scenario", folder: str | os.PathLike[str] = "."
) -> CascadeScenario:
    """Give the cascade scenario in `data`; `ScenarioError` names every fault after `where`."""
    try:
        return CascadeScenario.model_validate(data).placed(folder)
    except ValidationError as fault:
        found = [line for told in sentences(fault.errors(), CascadeScenario) for line in told.splitlines()]
        raise ScenarioError("\n".join(f"{where}: {sentence}" for sentence in found)) from None


def _stage_faults(scenario: CascadeScenario) -> list[str]:
    """Check the stages one by one, and their names."""
    faults = []
    if len(set(scenario.stages)) < len(scenario.stages):
        faults.append(f"stage: must have a name of its own each, got {', '.join(scenario.stages)}")
    unpriced = [stage.name for stage in scenario.stage if stage.usd_per_hour is None]
    if 0 < len(unpriced) < len(scenario.stage):
        faults.append(f"stage: usd_per_hour: must be given for every stage or none, got none for {unpriced[0]}")
    for number, stage in enumerate(scenario.stage):
        place = f"stage[{number}]"
        tables = scenario._stage_tables(stage) | {"replica": None, "routing": None}
        for where, rule in cross_faults({key: _dumped(value) for key, value in tables.items()}):
            if not where.startswith("workload"):
                faults.append(f"{place}.{where}: {rule}")
            elif number == 0:
                faults.append(f"{where}: {rule}")
        if stage.costs.usd_per_hour is not None:
            faults.append(f"{place}.costs.usd_per_hour: must be {place}.usd_per_hour, what one replica costs")
    return faults


def _dumped(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Table) else value


def _policy_faults(scenario: CascadeScenario) -> list[str]:
    policy, stages = scenario.policy, scenario.stages
    if isinstance(policy, Always) and policy.stage not in stages:
        return [f"policy.stage: must be a stage, got '{policy.stage}'{did_you_mean(policy.stage, stages)}"]
    if isinstance(policy, Threshold) and isinstance(policy.threshold, Sequence):
        given, wanted = len(policy.threshold), len(stages) - 1
        if given != wanted:
            return [f"policy.threshold: must be one number, or one for each of {wanted} stages, got {given}"]
    return []


def _kv_faults(scenario: CascadeScenario) -> list[str]:
    """Refuse a KV hand-over between stages that do not have the same keys and values."""
    if not isinstance(scenario.handover, KvHandover):
        return [
            f"stage[{number}].kv: must be left out unless handover.kind is 'kv'"
            for number, stage in enumerate(scenario.stage)
            if stage.kv is not None
        ]
    told = [stage.kv for stage in scenario.stage if stage.kv is not None]
    if len(told) < len(scenario.stage):
        lacking = [stage.name for stage in scenario.stage if stage.kv is None]
        return [f"handover.kind: 'kv' needs [stage.kv] at every stage, got none at {', '.join(lacking)}"]
    faults = []
    formats = list(dict.fromkeys(kv.format for kv in told))
    if len(formats) > 1:
        rule = "'kv' needs stages of one format, as other weights have other keys and values"
        faults.append(f"handover.kind: {rule}, got {', '.join(formats)}")
    deeper = len({kv.layers for kv in told}) > 1
    if deeper and scenario.handover.hidden_bytes_per_token is None:
        faults.append("handover.hidden_bytes_per_token: must be given where stages differ in layers")
    if not deeper and scenario.handover.hidden_bytes_per_token is not None:
        faults.append("handover.hidden_bytes_per_token: must be left out where all stages have the same layers")
    return faults
