"""The answer of a search in the words of an engine: the best candidate that it can express."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from analysis.tuning import export_sglang, export_tensorrt_llm, export_vllm
from analysis.tuning.engine_setting import WITH_MODEL, Setting, Words, setting_of
from analysis.tuning.findings import Export, Scored, TuneFindings
from calibration.common.errors import ExportError, ScenarioError, did_you_mean
from calibration.traces.manifest import DrafterInfo
from calibration.traces.paradigms import paradigm_of

Exporter = Callable[[Setting], Words]
_EXPORTERS: dict[str, tuple[Exporter, Mapping[str, str], str]] = {
    "vllm": (export_vllm.vllm, export_vllm.METHODS, export_vllm.SOURCE),
    "sglang": (export_sglang.sglang, export_sglang.ALGORITHMS, export_sglang.SOURCE),
    "tensorrt-llm": (export_tensorrt_llm.tensorrt_llm, export_tensorrt_llm.TYPES, export_tensorrt_llm.SOURCE),
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
            engine,
            scored.name,
            words.file,
            words.content,
            words.arguments,
            words.extra_files,
            scored.behind,
            notes,
            source,
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
