"""A cascade scenario: stages, traffic, who stops where and how a request is handed on, as one strict TOML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from calibration.common.errors import ScenarioError, did_you_mean
from calibration.common.settings import Table
from calibration.common.toml import read_toml, sentences
from simulator.cascade.settings import (
    Always,
    AnswerObjectives,
    CascadeWorkload,
    Handover,
    Items,
    KvHandover,
    Policy,
    Recompute,
    Stage,
    Threshold,
)
from simulator.scenario.fleet import Routing
from simulator.scenario.inputs import Placed
from simulator.scenario.scenario import Replica, Scenario, TraceSource, cross_faults


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
