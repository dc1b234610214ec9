"""A scenario: everything a simulation depends on, as one strict and frozen TOML file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from calibration.traces.manifest import FractionOfVerify, LinearCost
from simulator.toml import dumps

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Order = Literal["trace", "shuffled"]


class Section(BaseModel):
    """A table of the scenario: unknown keys are refused, values are never converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TraceSource(Section):
    """Where the recorded behaviour comes from: a bundled TraceSet by name, or a folder.

    `path` is relative to the scenario file. `domains` keeps only the sequences of these domains.
    """

    bundled: str | None = None
    path: str | None = None
    domains: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None


class DrafterChoice(Section):
    """The drafter, by its name in the TraceSet.

    Only sequences recorded with it are replayed. Naming one beside policy ``none`` keeps these same sequences, so
    that a baseline serves the requests that the drafter serves.
    """

    name: str


class NoSpeculation(Section):
    """One verified token per slot and iteration."""

    policy: Literal["none"] = "none"


class FixedLength(Section):
    """The same draft length for every slot in every round; 0 drafts nothing."""

    policy: Literal["fixed"]
    draft_tokens: Annotated[int, Field(ge=0)]


class OracleLength(Section):
    """As many tokens as will be accepted."""

    policy: Literal["oracle"]


class EngineSettings(Section):
    """The serving engine, in vLLM's words. `max_num_seqs`: the largest batch."""

    max_num_seqs: Count = 256


class ClosedLoop(Section):
    """A fixed number of clients, each submitting its next request the moment its last one ends.

    `requests`: how many are counted; every sequence once (times `copies`) by default. `keep_full` goes on submitting
    uncounted fillers until the last counted request has ended, so that no batch runs empty. `copies` = B serves B
    copies of one sequence as one batch, the next sequence when all of them have ended (then `concurrency` is B too).
    """

    kind: Literal["closed"]
    concurrency: Count
    requests: Count | None = None
    keep_full: bool = False
    copies: Count = 1
    order: Order = "trace"


class PoissonArrivals(Section):
    """Independent exponential gaps between arrivals, `rate_rps` a second on average."""

    kind: Literal["poisson"]
    rate_rps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    requests: Count | None = None
    order: Order = "trace"


class ArrivalFile(Section):
    """A CSV file with the columns arrival_s, prompt_tokens and output_tokens; `requests` keeps the first rows.

    A row takes its prompt length from the file and its acceptance from the recorded sequence with the shortest
    output that is at least as long, cut at `output_tokens`; equally short ones take turns.
    """

    kind: Literal["csv"]
    path: str
    requests: Count | None = None


class Measured(Section):
    """Fitted to the timings of the TraceSet."""

    kind: Literal["measured"]


class Stated(Section):
    """The constants that came with an imported TraceSet."""

    kind: Literal["stated"]


Stopping = Annotated[NoSpeculation | FixedLength | OracleLength, Field(discriminator="policy")]
Workload = Annotated[ClosedLoop | PoissonArrivals | ArrivalFile, Field(discriminator="kind")]
VerifierCost = Annotated[Measured | Stated | LinearCost, Field(discriminator="kind")]
DrafterCost = Annotated[Measured | Stated | LinearCost | FractionOfVerify, Field(discriminator="kind")]


class Costs(Section):
    """Prices in seconds. A price left out comes from the TraceSet: its timings, else the constants it states.

    `overhead_s`: host time of an engine iteration; 0 unless given, or stated beside stated verifier constants.
    """

    overhead_s: Seconds | None = None
    verifier: VerifierCost | None = None
    drafter: DrafterCost | None = None


class Scenario(Section):
    """One simulation, complete: same scenario, same TraceSet, same version, same bytes."""

    name: str = "unnamed"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    traces: TraceSource = TraceSource()
    drafter: DrafterChoice | None = None
    stopping: Stopping = NoSpeculation()
    engine: EngineSettings = EngineSettings()
    workload: Workload
    costs: Costs = Costs()

    _folder: Path = PrivateAttr(default=Path())
    """What relative paths are relative to."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        faults = cross_faults(self.model_dump())
        if faults:
            raise ValueError("; ".join(f"{place}: {rule}" for place, rule in faults))
        return self

    @property
    def speculates(self) -> bool:
        """Whether its policy drafts at all."""
        return self.stopping.policy != "none"

    def locate(self, path: str) -> Path:
        """Give the place of a path written in the scenario."""
        return self._folder / path

    def placed(self, folder: str | os.PathLike[str]) -> Self:
        """Give the same scenario with its relative paths meant relative to `folder`."""
        copy = self.model_copy()
        copy._folder = Path(folder)
        return copy

    @property
    def hash(self) -> str:
        """sha256 of every setting, defaults included; of paths only the last part, so that folders may move."""
        data = self.model_dump(mode="json", exclude_none=True)
        for section in ("traces", "workload"):
            if "path" in data[section]:
                data[section]["path"] = PurePath(data[section]["path"]).name
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_toml(self, folder: str | os.PathLike[str] | None = None) -> str:
        """Give it as TOML, defaults filled in; relative paths are rewritten to start from `folder`."""
        data = self.model_dump(mode="json", exclude_none=True)
        for section in ("traces", "workload"):
            path = data[section].get("path")
            if folder is not None and path is not None and not Path(path).is_absolute():
                data[section]["path"] = Path(os.path.relpath(self.locate(path), folder)).as_posix()
        return dumps(data)


def cross_faults(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give (place, rule) for every rule between keys that the (maybe unchecked) scenario `data` breaks."""
    faults = []
    traces, stopping, workload, engine = (
        value if isinstance(value := data.get(key), Mapping) else {}
        for key in ("traces", "stopping", "workload", "engine")
    )
    if traces.get("bundled") is not None and traces.get("path") is not None:
        faults.append(("traces", "must have bundled or path, not both"))
    policy = stopping.get("policy", "none")
    if policy in ("fixed", "oracle") and data.get("drafter") is None:
        faults.append(("drafter", f"must be given for policy '{policy}', e.g. name = 'prompt-lookup'"))
    copies = workload.get("copies", 1)
    if workload.get("kind") == "closed" and isinstance(copies, int) and copies > 1:
        if workload.get("concurrency") != copies:
            faults.append(
                ("workload.concurrency", f"must equal copies = {copies}, got {workload.get('concurrency')}")
            )
        requests = workload.get("requests")
        if isinstance(requests, int) and requests % copies:
            faults.append(("workload.requests", f"must be a multiple of copies = {copies}, got {requests}"))
        if workload.get("keep_full"):
            faults.append(("workload.keep_full", "must be false where copies > 1, got true"))
        slots = engine.get("max_num_seqs", copies)
        if isinstance(slots, int) and slots < copies:
            faults.append(("engine.max_num_seqs", f"must be at least workload.copies = {copies}, got {slots}"))
    return faults
