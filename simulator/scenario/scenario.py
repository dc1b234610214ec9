"""A scenario: everything a simulation depends on, as one strict and frozen TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from calibration.common.errors import ScenarioError
from calibration.common.plugins import PluginTable, by_name
from calibration.common.settings import Count, Natural, Positive, Seconds, Table, replaced
from calibration.common.toml import sentences
from calibration.traces.manifest import FractionOfVerify, LinearCost
from simulator.scenario.costs import Roofline
from simulator.scenario.fleet import (
    Batching,
    EngineKeys,
    EngineSettings,
    Outages,
    Placement,
    Routing,
    engine_faults,
    fleet_faults,
)
from simulator.scenario.inputs import BundledTraces, Placed, RunFolder, TraceFolder
from simulator.scenario.routing import routes_drafters
from simulator.scenario.stopping import NoSpeculation, Stopping
from simulator.scenario.workload import Workload, workload_faults


class TraceSource(Table):
    """Where the recorded behaviour comes from: a bundled TraceSet by name, or a folder.

    `path` is relative to the scenario file. `domains` keeps only the sequences of these domains.
    """

    bundled: BundledTraces | None = None
    path: TraceFolder | None = None
    domains: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None


class DrafterChoice(Table):
    """The drafter, by its name in the TraceSet.

    Only sequences recorded with it are replayed. Naming one beside policy ``none`` keeps these same sequences, so
    that a baseline serves the requests that the drafter serves.
    """

    name: str


class Measured(Table):
    """Fitted to the timings of the TraceSet."""

    kind: Literal["measured"]


class Stated(Table):
    """The constants that came with an imported TraceSet."""

    kind: Literal["stated"]


class Observed(Table):
    """Fitted to an engine's own steps in measured runs of it, of the same model, device and clock.

    `runs`: their folders, relative to the scenario file. The steps contain the host time of an iteration, so that
    `overhead_s` must be left out. Steps of other shapes (longer drafts, larger batches) are priced as one forward
    pass over all their tokens; see `simulator.pricing.observed`. For a drafter: its own steps where the engine timed
    them, else what rounds with drafts took beyond the verifier's price; free where it has no model and no run
    drafted.
    """

    kind: Literal["observed"]
    runs: Annotated[tuple[RunFolder, ...], Field(min_length=1, strict=False)]


class PluginCost(PluginTable):
    """Step times from outside, by the name of the entry point; written ``kind = "plugin:name"``."""

    group: ClassVar[str] = "paceline.costs"
    kind: Literal["plugin"]


VerifierCost = Annotated[
    Measured | Stated | Observed | Roofline | LinearCost | PluginCost, Field(discriminator="kind"), by_name("kind")
]
DrafterCost = Annotated[
    Measured | Stated | Observed | Roofline | LinearCost | FractionOfVerify | PluginCost,
    Field(discriminator="kind"),
    by_name("kind"),
]


class Costs(Table):
    """Prices in seconds. A price left out comes from the TraceSet: its timings, else the constants it states.

    Beside an observed verifier, drafters left out are observed in the same runs. `overhead_s`: host time of an engine
    iteration; 0 unless given, or stated beside stated verifier constants.
    """

    overhead_s: Seconds | None = None
    verifier: VerifierCost | None = None
    drafter: DrafterCost | None = None
    drafters: Annotated[dict[str, DrafterCost], Field(min_length=1)] | None = None
    """Prices by name, where ``[routing] drafter`` names several drafters; `drafter` is for those not in here."""
    usd_per_hour: Positive | None = None
    """What the whole simulated fleet costs an hour; without it nothing is said about money."""


class Objectives(Table):
    """Service-level objectives, in ms, each of them for every single request; those left out are not asked for.

    `ttft_ms`, `tpot_ms` and `e2el_ms` as ``vllm bench serve --goodput`` has them (the TPOT of a request with one
    output token counts as 0). `itl_ms` bounds the longest gap between two emissions of the request.
    """

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    itl_ms: Positive | None = None
    e2el_ms: Positive | None = None


class Measurement(Table):
    """What is left out of latencies and throughputs because the engine was still filling up; choose one key.

    `warmup_requests`: the first so many requests that end. `warmup_s`: those that end in the first so many seconds
    after the first arrival. ``warmup = "auto"``: as many as MSER-5 says (see `simulator.results.result`).
    """

    warmup_requests: Natural | None = None
    warmup_s: Seconds | None = None
    warmup: Literal["auto"] | None = None


class Replica(EngineKeys):
    """One replica of the fleet, or `count` equal ones (named `name`-0, `name`-1, ...).

    Keys of ``[engine]`` and the tables of its own replace those of the scenario; `traces` must hold the same
    sequences, recorded on another device or with other drafters. `failures`: pairs [fails at, is back at] in seconds;
    its requests go back to the router with the tokens they have, and their KV memory is lost.
    """

    name: str = "replica"
    count: Count = 1
    max_num_seqs: Count | None = None
    traces: TraceSource | None = None
    drafter: DrafterChoice | None = None
    stopping: Stopping | None = None
    placement: Placement | None = None
    costs: Costs | None = None
    failures: Outages | None = None


class Scenario(Placed):
    """One simulation, complete: same scenario, same TraceSet, same version, same bytes."""

    name: str = "unnamed"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    traces: TraceSource = TraceSource()
    drafter: DrafterChoice | None = None
    stopping: Stopping = NoSpeculation()
    engine: EngineSettings = EngineSettings()
    workload: Workload
    costs: Costs = Costs()
    slo: Objectives | None = None
    measure: Measurement | None = None
    batching: Batching | None = None
    placement: Placement | None = None
    routing: Routing | None = None
    replica: Annotated[tuple[Replica, ...], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        faults = cross_faults(self.model_dump())
        if faults:
            raise ValueError("; ".join(f"{place}: {rule}" for place, rule in faults))
        return self

    def replace(self, key: str, value: Any) -> Scenario:
        """Return the scenario with `value` under the dotted `key`, be it a number or a whole table.

        >>> scenario.replace("stopping.draft_tokens", 3)  # doctest: +SKIP

        Raises `ScenarioError` where the result breaks a rule.
        """
        changed, faults = checked(replaced(self.model_dump(mode="json", exclude_unset=True), {key: value}))
        if changed is None:
            raise ScenarioError("\n".join(f"{self.name}: {fault}" for fault in faults))
        return changed.placed(self.locate("."))

    @property
    def speculates(self) -> bool:
        """Whether its policy drafts at all."""
        return self.stopping.policy != "none"


def checked(data: Mapping[str, Any]) -> tuple[Scenario | None, list[str]]:
    """Return the scenario in `data`, None where it breaks a rule, and a sentence for every fault."""
    scenario, faults = None, []
    try:
        scenario = Scenario.model_validate(data)
    except ValidationError as fault:
        faults += sentences((error for error in fault.errors() if error["loc"]), Scenario)
    return scenario, faults + [f"{place}: {rule}" for place, rule in cross_faults(data)]


def cross_faults(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give (place, rule) for every rule between keys that the (maybe unchecked) scenario `data` breaks."""
    faults = []
    traces, stopping, workload, engine = (
        value if isinstance(value := data.get(key), Mapping) else {}
        for key in ("traces", "stopping", "workload", "engine")
    )
    if traces.get("bundled") is not None and traces.get("path") is not None:
        faults.append(("traces", "must have bundled or path, not both"))
    faults += _choice_faults(data)
    policy = stopping.get("policy", "none")
    if policy != "none" and isinstance(policy, str) and data.get("drafter") is None and not routes_drafters(data):
        faults.append(("drafter", f"must be given for policy '{policy}', e.g. name = 'prompt-lookup'"))
    faults += workload_faults(workload, engine)
    faults += [(f"engine.{key}", rule) for key, rule in engine_faults(engine)]
    return faults + fleet_faults(data)


def _choice_faults(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Check that sections which are given say something, and one thing only."""
    faults = []
    slo, measure = data.get("slo"), data.get("measure")
    if isinstance(slo, Mapping) and all(slo.get(key) is None for key in Objectives.model_fields):
        faults.append(("slo", f"must state at least one of {', '.join(Objectives.model_fields)}"))
    if isinstance(measure, Mapping):
        given = [key for key in Measurement.model_fields if measure.get(key) is not None]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            faults.append(("measure", f"must have exactly one of {', '.join(Measurement.model_fields)}, got {got}"))
    return faults
