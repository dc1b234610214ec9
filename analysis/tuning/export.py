"""The answer of a search as the flags of an engine: the best candidate that it can express.

vLLM's ``--speculative-config``, SGLang's options with its file of adaptive steps where the length depends on the
batch, and ``speculative_config`` of TensorRT-LLM's LLM API; for each, what keeps a candidate from being expressed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.tuning.engine_schemas import (
    SglangAdaptiveConfig,
    SglangArguments,
    TensorrtOptions,
    VllmSpeculativeConfig,
)
from analysis.tuning.findings import Export, Scored, TuneFindings
from calibration.common.errors import ExportError, ScenarioError, did_you_mean
from calibration.traces.manifest import DrafterInfo
from calibration.traces.paradigms import EAGLE, EAGLE3, LOOKUP, MEDUSA, MODEL, SUFFIX, paradigm_of

WITH_MODEL = (EAGLE, EAGLE3, MODEL, MEDUSA)


@dataclass(frozen=True)
class Words:
    """A setting in an engine's own words: see `findings.Export`."""

    file: str | None
    content: str
    arguments: tuple[str, ...]
    notes: tuple[str, ...] = ()
    extra_files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One candidate: its stopping table, its drafters (none: no speculation), and the largest batch.

    `rule`: what chooses in every round or for every request, also how far the only drafter drafts; None for one
    drafter that the stopping table alone rules. `models`: where the weights of drafters are, by name.
    """

    name: str
    rule: str | None
    stopping: Mapping[str, Any]
    drafters: tuple[DrafterInfo, ...]
    models: Mapping[str, str]
    max_num_seqs: int

    @property
    def off(self) -> bool:
        """Whether nothing is drafted."""
        table = self.stopping.get("table")
        return self.stopping["policy"] == "none" or (table is not None and all(row[2] == 0 for row in table))

    def family(self, engine: str, known: Mapping[str, str]) -> str:
        """Give the family of the one drafter; `ExportError` unless `engine` has a word for it in `known`."""
        if self.rule is not None:
            raise ExportError(f"{engine} has no rule '{self.rule}' over drafters and lengths")
        if len(self.drafters) != 1:
            raise ExportError(f"{engine} serves one drafter at a time, not {len(self.drafters)}")
        (info,) = self.drafters
        found = paradigm_of(info.paradigm).family
        if found not in known:
            raise ExportError(
                f"{engine} has no drafter of paradigm '{info.paradigm}' ('{info.name}'); it has {', '.join(known)}"
            )
        return str(found)

    def model(self, family: str) -> str | None:
        """Give where the drafter's weights are; None for families without; `ExportError` where it is not known."""
        if family not in WITH_MODEL:
            return None
        name = self.drafters[0].name
        if name not in self.models:
            raise ExportError(f"the place of the weights of '{name}' is not known: --drafter-model {name}=PATH")
        return self.models[name]

    def lengths(self, engine: str, also: str = "") -> tuple[int, list[list[int]] | None]:
        """Give (longest draft, table by batch size up to the largest batch or None) of fixed lengths and tables."""
        policy = self.stopping["policy"]
        if policy == "fixed":
            return int(self.stopping["draft_tokens"]), None
        if policy == "by_batch":
            table = [list(row) for row in self.stopping["table"]]
            table[-1][1] = max(table[-1][1], self.max_num_seqs)
            return max(row[2] for row in table), table
        raise ExportError(
            f"{engine} has no policy '{policy}'; it has one fixed length, and a length by batch size{also}"
        )


def setting_of(
    scored: Scored, drafters: Mapping[str, DrafterInfo], models: Mapping[str, str], max_num_seqs: int
) -> Setting:
    """Give the setting of a candidate; `drafters` are those of the TraceSet by name."""
    rule = (scored.overrides.get("routing.drafter") or {}).get("policy", "static")
    return Setting(
        scored.name,
        None if rule == "static" else rule,
        scored.overrides["stopping"],
        tuple(drafters[name] for name in scored.drafters),
        models,
        max_num_seqs,
    )


SGLANG_SOURCE = (
    "python/sglang/srt/server_args.py; docs/advanced_features/speculative_decoding.md at 067ad4d; "
    "python/sglang/srt/speculative/adaptive_spec_params.py at 015c872"
)
ALGORITHMS = {LOOKUP: "NGRAM", EAGLE: "EAGLE", EAGLE3: "EAGLE3", MODEL: "STANDALONE"}
ADAPTIVE = "sglang-adaptive.json"


def sglang(setting: Setting) -> Words:
    """Give the options of `setting`; `ExportError` where SGLang has no words for it."""
    if setting.off:
        return Words(None, "", (), ("leave --speculative-algorithm out: nothing is drafted",))
    family = setting.family("SGLang", ALGORITHMS)
    adaptive = _adaptive(setting)
    if adaptive is not None and family not in (EAGLE, EAGLE3):
        raise ExportError("SGLang lets the length depend on the batch for EAGLE and EAGLE-3 only, by adaptive steps")
    steps = _first_steps(setting, adaptive)
    options: dict[str, Any] = {"speculative_algorithm": ALGORITHMS[family]}
    notes, files = [], {}
    if family == LOOKUP:
        options |= {"speculative_num_draft_tokens": steps + 1, "speculative_ngram_max_bfs_breadth": 1}
        notes.append(
            "SGLang looks up n-grams in a cache of its own, not in the request alone: other drafts may match"
        )
    else:
        options |= {
            "speculative_draft_model_path": setting.model(family),
            "speculative_num_steps": steps,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": steps + 1,
        }
    if adaptive is not None:
        options |= {"speculative_adaptive": True, "speculative_adaptive_config": ADAPTIVE}
        files[ADAPTIVE] = json.dumps(_flat(adaptive), indent=1) + "\n"
        notes.append(f"{ADAPTIVE} must be where the server is started, or named by its whole path")
    SglangArguments.model_validate(options)
    lines = [f"{key.replace('_', '-')}: {json.dumps(value)}\n" for key, value in options.items()]
    return Words("sglang.yaml", "".join(lines), tuple(_command(options)), tuple(notes), files)


def _command(options: dict[str, Any]) -> list[str]:
    words = []
    for key, value in options.items():
        words.append(f"--{key.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def _adaptive(setting: Setting) -> SglangAdaptiveConfig | None:
    """Give the adaptive steps: those of the policy, or for a table by batch size one tier with one length a range."""
    told = setting.stopping
    if setting.stopping["policy"] == "moving_average":
        from simulator.scenario.stopping import MovingAverage

        policy = MovingAverage.model_validate(dict(told))
        shared = {"ema_alpha": policy.ema_alpha, "update_interval": policy.update_interval}
        tiers = {key: tier.model_dump() for key, tier in policy.tiers.items()}
        return SglangAdaptiveConfig.model_validate(
            {**shared, "warmup_batches": policy.warmup_batches, "tiers": tiers}
        )
    _, table = setting.lengths("SGLang", ", and its adaptive steps (policy 'moving_average')")
    if table is None:
        return None
    return SglangAdaptiveConfig.model_validate(
        {"tiers": {str(first): {"candidate_steps": [tokens]} for first, _, tokens in table}}
    )


def _first_steps(setting: Setting, adaptive: SglangAdaptiveConfig | None) -> int:
    """Give ``speculative_num_steps``: the fixed length, or one of the adaptive steps to begin with."""
    if adaptive is None:
        return int(setting.stopping["draft_tokens"])
    wanted = (
        int(setting.stopping.get("initial_steps", 3))
        if setting.stopping["policy"] == "moving_average"
        else max(adaptive.steps)
    )
    return min(adaptive.steps - {0} or {0}, key=lambda step: (abs(step - wanted), step))


def _flat(adaptive: SglangAdaptiveConfig) -> dict[str, Any]:
    """Give the file's own form: tiers beside what they share."""
    told = adaptive.model_dump(mode="json")
    return {**{key: value for key, value in told.items() if key != "tiers"}, **told["tiers"]}


TENSORRT_SOURCE = (
    "tensorrt_llm/llmapi/llm_args.py (DecodingBaseConfig and its subclasses); LLM API reference 1.4.0rc1"
)
TYPES = {LOOKUP: "NGram", EAGLE3: "Eagle3", MODEL: "Draft_Target"}
FILE = "tensorrt-llm.yaml"


def tensorrt_llm(setting: Setting) -> Words:
    """Give the YAML of `setting`; `ExportError` where TensorRT-LLM has no words for it."""
    if setting.off:
        return Words(None, "", (), ("leave speculative_config out: nothing is drafted",))
    family = setting.family("TensorRT-LLM", TYPES)
    longest, table = setting.lengths("TensorRT-LLM")
    config: dict[str, Any] = {"decoding_type": TYPES[family], "max_draft_len": longest}
    if (model := setting.model(family)) is not None:
        config["speculative_model"] = model
    if family == LOOKUP and (size := setting.drafters[0].settings.get("ngram_max")) is not None:
        config["max_matching_ngram_size"] = size
    notes = []
    if table is not None:
        config["draft_len_schedule"] = _schedule(table)
        notes.append(
            "draft_len_schedule as releases from 1.3 on read it: keys are the largest batch of each length; before, "
            "they were the smallest"
        )
    TensorrtOptions.model_validate({"speculative_config": config})
    text = _yaml({"speculative_config": config})
    return Words(FILE, text, ("--extra_llm_api_options", FILE), tuple(notes))


def _schedule(table: list[list[int]]) -> dict[int, int]:
    """Give the largest batch of each length; above the last one nothing is drafted anyway."""
    lengths = [row[2] for row in table]
    if lengths[0] != max(lengths):
        raise ExportError(
            "TensorRT-LLM needs the longest draft at the smallest batches in draft_len_schedule; "
            f"this table begins with {lengths[0]} and goes up to {max(lengths)}"
        )
    schedule = {last: tokens for _, last, tokens in table}
    while schedule[max(schedule)] == 0:
        del schedule[max(schedule)]
    return schedule


def _yaml(table: Mapping[Any, Any], indent: str = "") -> str:
    """Give `table`, maps of maps, texts and whole numbers, as YAML; a text in quotes as JSON has it is YAML too."""
    lines = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}:\n{_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
    return "".join(lines)


VLLM_SOURCE = (
    "vllm/config/speculative.py at 002e77c; docs/features/speculative_decoding/dynamic_speculative_decoding.md"
)
METHODS = {
    LOOKUP: "ngram",
    SUFFIX: "suffix",
    EAGLE: "eagle",
    EAGLE3: "eagle3",
    MODEL: "draft_model",
    MEDUSA: "medusa",
}


def vllm(setting: Setting) -> Words:
    """Give the JSON of `setting`; `ExportError` where vLLM has no words for it."""
    if setting.off:
        return Words(None, "", (), ("leave --speculative-config out: nothing is drafted",))
    family = setting.family("vLLM", METHODS)
    longest, table = setting.lengths("vLLM")
    config: dict[str, Any] = {"method": METHODS[family]}
    if (model := setting.model(family)) is not None:
        config["model"] = model
    config["num_speculative_tokens"] = longest
    notes = []
    if table is not None:
        config["num_speculative_tokens_per_batch_size"] = table
        if family not in (EAGLE, EAGLE3):
            notes.append("vLLM documents its schedule by batch size as tested with EAGLE, EAGLE-3 and DFlash")
    if family == LOOKUP:
        told = setting.drafters[0].settings
        sizes = {"prompt_lookup_max": told.get("ngram_max"), "prompt_lookup_min": told.get("ngram_min")}
        config |= {key: value for key, value in sizes.items() if value is not None}
    VllmSpeculativeConfig.model_validate(config)
    text = json.dumps(config)
    return Words("vllm.json", text + "\n", ("--speculative-config", text), tuple(notes))


Exporter = Callable[[Setting], Words]
_EXPORTERS: dict[str, tuple[Exporter, Mapping[str, str], str]] = {
    "vllm": (vllm, METHODS, VLLM_SOURCE),
    "sglang": (sglang, ALGORITHMS, SGLANG_SOURCE),
    "tensorrt-llm": (tensorrt_llm, TYPES, TENSORRT_SOURCE),
}
ENGINES = tuple(_EXPORTERS)


def parse_models(texts: Sequence[str], drafters: Sequence[DrafterInfo]) -> dict[str, str]:
    """Give the places of weights by drafter from ``NAME=PATH``; ``PATH`` alone is for the only one that needs it."""
    names = [info.name for info in drafters]
    needing = [info.name for info in drafters if paradigm_of(info.paradigm).family in WITH_MODEL]
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals:
            if len(needing) != 1:
                raise ScenarioError(
                    f"--drafter-model: must be NAME=PATH where {len(needing)} drafters have weights, got '{text}'"
                )
            name, path = needing[0], text
        if name not in names:
            raise ScenarioError(f"--drafter-model: no such drafter, got '{name}'{did_you_mean(name, names)}")
        if not path.strip():
            raise ScenarioError(f"--drafter-model: must be NAME=PATH, got '{text}'")
        found[name] = path.strip()
    return found


def check_exports(engines: Sequence[str], drafters: Sequence[DrafterInfo], models: Mapping[str, str]) -> None:
    """Refuse, before anything is run, an export that could only be empty or would lack the place of weights."""
    faults = []
    for engine in engines:
        if engine not in _EXPORTERS:
            raise ScenarioError(f"--export: no such engine, got '{engine}'{did_you_mean(engine, ENGINES)}")
        known = _EXPORTERS[engine][1]
        able = [info for info in drafters if paradigm_of(info.paradigm).family in known]
        if not able:
            have = ", ".join(dict.fromkeys(info.paradigm for info in drafters))
            faults.append(f"--export {engine}: has words for {', '.join(known)} drafters only, got {have}")
        faults += [
            f"--export {engine}: needs the place of the weights of '{info.name}': --drafter-model {info.name}=PATH "
            "(or leave the drafter out with --drafters)"
            for info in able
            if paradigm_of(info.paradigm).family in WITH_MODEL and info.name not in models
        ]
    if faults:
        raise ScenarioError("\n".join(faults))


def export(
    findings: TuneFindings,
    engine: str,
    drafters: Sequence[DrafterInfo],
    models: Mapping[str, str],
    max_num_seqs: int,
) -> Export:
    """Give the best candidate that `engine` can express, and say what it gives up against the best.

    Raises `ExportError` where it can express none.
    """
    write, _, source = _EXPORTERS[engine]
    by_name = {info.name: info for info in drafters}
    reasons: dict[str, str] = {}
    for scored in _ranked(findings):
        setting = setting_of(scored, by_name, models, max_num_seqs)
        try:
            words = write(setting)
        except ExportError as fault:
            reasons[scored.name] = str(fault)
            continue
        notes = (*words.notes, *_engine_notes(scored))
        if scored.name != findings.best.name:
            why = reasons[findings.best.name]
            notes = (f"not the best, '{findings.best.name}': {why}", *notes)
        return Export(
            engine=engine,
            candidate=scored.name,
            file=words.file,
            content=words.content,
            arguments=words.arguments,
            extra_files=words.extra_files,
            behind=scored.behind,
            notes=notes,
            source=source,
        )
    raise ExportError(f"--export {engine}: {reasons[findings.best.name]}")


def _ranked(findings: TuneFindings) -> list[Scored]:
    """The best first, then the others by their distance to it; without those that miss an SLO that can be kept.

    Those that left in the first rung come last: few replications say little about how far behind they are.
    """
    late = ("misses the SLO",) if findings.feasible else ()
    others = [one for one in findings.candidates if one.name != findings.best.name and one.status not in late]
    others.sort(key=lambda one: (one.status.startswith("left in rung 1"), -(one.behind.value or 0.0)))
    return [findings.best, *others]


def _engine_notes(scored: Scored) -> list[str]:
    """Name the settings of the engine itself that the candidate was run with."""
    told = [
        f"{key.partition('.')[2]} = {value}" for key, value in scored.overrides.items() if key.startswith("engine.")
    ]
    return [f"with {', '.join(told)}, under the engine's own name for it"] if told else []
