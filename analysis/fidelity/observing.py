"""Run scenarios on real engines: the same requests and arrivals as in the simulation, condition by condition.

Each condition becomes a measured run in a folder of its own, with the scenario that predicts it beside it. Conditions
take turns, one repeat each, so that a machine whose speed drifts does so for all of them alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import SecretStr

from calibration.common.errors import CalibrationError, ScenarioError, did_you_mean
from calibration.common.progress import StageProgress
from calibration.engines.drive import Engine
from calibration.engines.record import Condition, Recording, warm_up
from calibration.observe.prompts import Prompt, recorded_prompts
from calibration.traces import TraceSet
from calibration.traces.manifest import DrafterInfo
from calibration.traces.paradigms import LOOKUP, paradigm_of
from simulator.drafter_routing.make import drafter_names
from simulator.playback.replay import SequenceTable, select_sequences
from simulator.running.run import read_traces
from simulator.scenario.loading import load_scenario
from simulator.scenario.scenario import Scenario
from simulator.scenario.stopping import ByBatch, FixedLength, NoSpeculation
from simulator.workload import Source, make_source

if TYPE_CHECKING:
    from calibration.drafters.info import DrafterSettings
    from calibration.models.load import Verifier

Role = Literal["fit", "held-out"]
DraftTokens = int | tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Planned:
    """One scenario, ready to be run on an engine."""

    path: Path
    role: Role
    scenario: Scenario
    traces: TraceSet
    sequences: SequenceTable
    prompts: tuple[Prompt, ...]

    def source(self) -> Source:
        """Give a fresh workload: that of the simulated run."""
        return make_source(self.scenario, self.sequences)

    def about(self, out: Path, command: str) -> dict[str, Any]:
        """Give what a measured run in the folder ``out/<scenario name>`` says of its condition."""
        return {
            "name": self.scenario.name,
            "role": self.role,
            "scenario": self.scenario.to_toml((out / self.scenario.name).absolute()),
            "scenario_hash": self.scenario.hash,
            "command": command,
        }

    @property
    def drafter(self) -> DrafterInfo | None:
        """The drafter, None where nothing is drafted."""
        if not self.scenario.speculates or self.scenario.drafter is None:
            return None
        return self.traces.manifest.drafter(self.scenario.drafter.name)

    @property
    def draft_tokens(self) -> DraftTokens:
        """The draft length, or a table of it by batch size; `ScenarioError` for other policies."""
        stopping = self.scenario.stopping
        if isinstance(stopping, NoSpeculation):
            return 0
        if isinstance(stopping, FixedLength):
            return stopping.draft_tokens
        if isinstance(stopping, ByBatch):
            return stopping.table
        raise ScenarioError(
            f"{self.path}: stopping.policy: must be none, fixed or by_batch to be run on a real engine, "
            f"got '{stopping.policy}'"
        )


def plan(path: str | os.PathLike[str], role: Role) -> Planned:
    """Read the scenario at `path`; its requests must have recorded prompts. Costs are not looked at.

    Raises `ScenarioError`, `TraceError`, `ReplayError` or `CalibrationError`.
    """
    scenario = load_scenario(path)
    if scenario.replica is not None:
        raise ScenarioError(f"{path}: replica: must be left out, one engine is driven")
    traces = read_traces(scenario)
    sequences = select_sequences(traces, domains=scenario.traces.domains, drafter=drafter_names(scenario))
    prompts = recorded_prompts(traces, sequences.ids)
    return Planned(Path(path), role, scenario, traces, sequences, tuple(prompts))


def plans(fit: Sequence[str], held_out: Sequence[str]) -> list[Planned]:
    """Read all scenarios; `ScenarioError` where two have one name."""
    found = [plan(path, "fit") for path in fit] + [plan(path, "held-out") for path in held_out]
    names: dict[str, Path] = {}
    for one in found:
        other = names.setdefault(one.scenario.name, one.path)
        if other is not one.path:
            raise ScenarioError(f"{one.path}: name: must differ from that of {other}, got '{one.scenario.name}'")
    return found


def observe_engines(
    planned: Sequence[Planned],
    make_engine: Callable[[Planned], Engine],
    out: Path,
    *,
    repeats: int,
    clock: Literal["thread-cpu", "wall"],
    command: str,
    progress: StageProgress | None = None,
) -> list[Path]:
    """Run every condition `repeats` times in turns; give the folders of the measured runs, ``out/<scenario name>``.

    Finished repeats stay where an interrupted call left them; the same call goes on.
    """
    report = progress or (lambda stage, done, total: None)
    recordings = []
    for one in planned:
        engine = make_engine(one)
        condition = Condition(
            repeats=repeats,
            clock=clock,
            unknown=tuple(getattr(engine, "unknown", ())),
            **one.about(out, command),
        )
        recordings.append((one, Recording(out / one.scenario.name, condition, engine), engine))
    warm: set[int] = set()
    done = sum(recording.taken for _, recording, _ in recordings)
    total = repeats * len(recordings)
    report("observe", done, total)
    for repeat in range(repeats):
        for one, recording, engine in recordings:
            if recording.taken > repeat:
                continue
            if id(engine) not in warm:
                warm_up(engine, one.prompts)
                warm.add(id(engine))
            recording.take(one.source(), one.prompts, progress=progress)
            done += 1
            report("observe", done, total)
    return [recording.folder for _, recording, _ in recordings]


def own_engines(
    verifier: Verifier, drafters: Sequence[DrafterSettings], **memory: Any
) -> Callable[[Planned], Engine]:
    """Give a maker of paceline's own engine: one for each drafter, draft length and ``[engine]`` table.

    `drafters` are those of the job that recorded the TraceSet; `memory`: `kv`, `block_size`, `max_model_len`.
    """
    from calibration.drafters.kinds import build_drafter
    from calibration.engines.own.engine import OwnEngine

    by_name = {settings.label: settings for settings in drafters}
    made: dict[tuple[Any, ...], Engine] = {}

    def make(one: Planned) -> Engine:
        limits = one.scenario.engine
        name = None if one.drafter is None else one.drafter.name
        if name is not None and name not in by_name:
            raise CalibrationError(f"{one.path}: drafter '{name}': must be in the job{did_you_mean(name, by_name)}")
        key = (name, one.draft_tokens, limits)
        if key not in made:
            made[key] = OwnEngine(
                verifier,
                max_num_seqs=limits.max_num_seqs,
                drafter=None if name is None else build_drafter(by_name[name], verifier),
                draft_tokens=one.draft_tokens,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                enable_chunked_prefill=bool(limits.enable_chunked_prefill),
                long_prefill_token_threshold=limits.long_prefill_token_threshold,
                **memory,
            )
        return made[key]

    return make


def openvino_engines(
    gguf: str | os.PathLike[str], settings: Mapping[str, Any] | None = None
) -> Callable[[Planned], Engine]:
    """Give a maker of OpenVINO GenAI pipelines over the model in `gguf`, plain or with its own prompt lookup.

    `settings` are further ones of `calibration.engines.openvino_plan.OpenVinoSettings`.
    """
    from calibration.engines.openvino import OpenVinoEngine
    from calibration.engines.openvino_plan import OpenVinoSettings

    made: dict[OpenVinoSettings, Engine] = {}

    def make(one: Planned) -> Engine:
        limits, drafter, length = one.scenario.engine, one.drafter, one.draft_tokens
        chosen: dict[str, Any] = {"max_num_seqs": limits.max_num_seqs, **(settings or {})}
        if limits.max_num_batched_tokens is not None:
            chosen["max_num_batched_tokens"] = limits.max_num_batched_tokens
        chosen["dynamic_split_fuse"] = bool(limits.enable_chunked_prefill)
        if drafter is not None and length:
            if paradigm_of(drafter.paradigm).family != LOOKUP or not isinstance(length, int):
                rule = "must be prompt lookup of a fixed length: OpenVINO GenAI is driven so"
                raise CalibrationError(f"{one.path}: drafter '{drafter.name}': {rule}")
            chosen |= {"mode": "prompt-lookup", "num_assistant_tokens": length}
            chosen |= {"max_ngram_size": int(drafter.settings["ngram_max"])}
        key = OpenVinoSettings(**chosen)
        if key not in made:
            made[key] = OpenVinoEngine(gguf, one.traces.manifest.verifier.name, key)
        return made[key]

    return make


def observe(
    url: str,
    scenarios: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    fit: Sequence[str | os.PathLike[str]] = (),
    repeats: int = 1,
    model: str | None = None,
    api_key: SecretStr | str | None = None,
    endpoint: Literal["completions", "chat"] = "completions",
    tokenizer: str | None = None,
    timeout_s: float = 300.0,
    command: str = "",
    progress: StageProgress | None = None,
) -> list[Path]:
    """Run scenarios on the server at `url` and return the folders of the measured runs, ``out/<scenario name>``.

    Args:
        url: Where the server listens; anything that speaks the OpenAI protocol.
        scenarios: Files of scenarios whose measured runs are held out: predictions may not look at them.
        out: Folder for the measured runs.
        fit: Files of scenarios whose measured runs predictions may be fitted to.
        repeats: How often each is run.
        model: Which model, where several are served.
        api_key: The key of the server, if it wants one; it is never written down.
        endpoint: Which of the protocol's two.
        tokenizer: Folder of a tokenizer, where the server takes text only.
        timeout_s: Seconds without a word after which a request counts as lost.
        command: What the measured runs say they were made by.
        progress: Hears (what, requests done, in all).

    Raises:
        CalibrationError: The server cannot be used. Also `ScenarioError`, `TraceError` and `ReplayError`.
    """
    from calibration.observe.prompts import with_text
    from calibration.observe.run import Observation
    from calibration.observe.run import observe as over_http

    folder, report = Path(out), progress or (lambda stage, done, total: None)
    key = SecretStr(api_key) if isinstance(api_key, str) else api_key
    folders = []
    for one in plans([str(path) for path in fit], [str(path) for path in scenarios]):
        run = over_http(
            url,
            one.source,
            with_text(one.prompts, tokenizer),
            Observation(**one.about(folder, command)),
            model=model,
            api_key=key,
            endpoint=endpoint,
            timeout_s=timeout_s,
            repeats=repeats,
            progress=partial(report, f"observe {one.scenario.name}"),
        )
        folders.append(run.write(folder / one.scenario.name))
    return folders
