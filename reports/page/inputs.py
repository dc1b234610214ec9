"""What a report is made from: TraceSets and results, told apart by the files in their folders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.cascade import CascadeFindings
from analysis.fidelity.table import Fidelity
from analysis.fidelity.validate import read as read_fidelity
from analysis.tuning import TuneFindings
from calibration.common.errors import ReportError, did_you_mean
from calibration.traces import TraceSet, bundled, bundled_names, bundled_path
from calibration.traces.manifest import parse_manifest
from simulator.results.result import RunResult
from simulator.scenario.loading import load_scenario
from simulator.scenario.scenario import Scenario


@dataclass(frozen=True)
class Summed:
    """Replications or a comparison: what its JSON file says, and the scenarios that were run, in its order."""

    told: dict[str, Any]
    scenarios: tuple[Scenario, ...]


@dataclass(frozen=True)
class Tuned:
    """What a search found, and the scenario of the best candidate."""

    findings: TuneFindings
    best: Scenario

    @property
    def scenario(self) -> Scenario:
        """The best one, called by what makes it differ from the scenario that was tuned."""
        return self.best.model_copy(update={"name": f"tuned: {self.findings.best.name}"})


@dataclass
class Inputs:
    """Everything that was given, by the name of its folder."""

    traces: dict[str, TraceSet] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    """Of the TraceSets."""
    runs: dict[str, RunResult] = field(default_factory=dict)
    replications: dict[str, Summed] = field(default_factory=dict)
    comparisons: dict[str, Summed] = field(default_factory=dict)
    tuned: dict[str, Tuned] = field(default_factory=dict)
    cascades: dict[str, CascadeFindings] = field(default_factory=dict)
    fidelities: dict[str, Fidelity] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all inputs, kind by kind."""
        return tuple(dict.fromkeys(name for kept in vars(self).values() for name in kept))

    @property
    def scenarios(self) -> dict[str, Scenario]:
        """Every scenario that was simulated, by its name; of equal ones the first."""
        found: dict[str, Scenario] = {}
        for scenario in (
            *(run.scenario for run in self.runs.values()),
            *(
                one
                for several in (*self.replications.values(), *self.comparisons.values())
                for one in several.scenarios
            ),
            *(one.scenario for one in self.tuned.values()),
        ):
            if scenario.hash not in {other.hash for other in found.values()}:
                name = scenario.name if scenario.name not in found else f"{scenario.name} ({len(found) + 1})"
                found[name] = scenario
        return found

    @property
    def created(self) -> str:
        """When the youngest of what was recorded or measured was made, as its manifest says (ISO 8601)."""
        dates = [traces.manifest.created for traces in self.traces.values()]
        dates += [fidelity.created for fidelity in self.fidelities.values()]
        dates += [str(run.summary["provenance"]["traces_created"]) for run in self.runs.values()]
        dates += [str(one.told["provenance"]["traces_created"]) for one in self.replications.values()]
        dates += [
            str(told["traces_created"])
            for one in self.comparisons.values()
            for told in one.told["provenance"].values()
        ]
        dates += [_created(one.best) for one in self.tuned.values()]
        return max((date for date in dates if date), default="")


def _created(scenario: Scenario) -> str:
    """Give when the TraceSet of `scenario` was made; empty where it is not to be found."""
    source = scenario.traces
    folder = bundled_path(source.bundled) if source.bundled else scenario.locate(source.path or ".")
    file = folder / "manifest.json"
    return parse_manifest(_text(file), file).created if file.is_file() else ""


def read_inputs(paths: Iterable[str | os.PathLike[str]]) -> Inputs:
    """Read every one of `paths`; `ReportError` says of one that is none of what a report can read what was sought.

    A path is the name of a bundled TraceSet, a TraceSet, or a folder that ``paceline simulate`` (also with
    replications), ``compare``, ``tune``, ``cascade`` or ``validate`` wrote; or the file of it that tells,
    such as fidelity.json.
    """
    inputs = Inputs()
    for given in paths:
        path = Path(given)
        if str(given) in bundled_names() and not path.exists():
            inputs.traces[str(given)] = bundled(str(given))
            inputs.folders[str(given)] = bundled_path(str(given))
            continue
        folder, only = (path.parent, path.name) if path.is_file() else (path, None)
        kind = next((k for k in KINDS if (folder / k.file).is_file() and only in (None, k.file)), None)
        if kind is None or (only is not None and only != kind.file):
            raise ReportError(f"{given}: {_sought(path)}")
        kind.read(inputs, _name(inputs, path), folder)
    if not any(vars(inputs).values()):
        raise ReportError("report: needs at least one TraceSet or result")
    return inputs


@dataclass(frozen=True)
class Kind:
    """One kind of input: the file that tells it, what it is called, and how it is read."""

    file: str
    title: str
    read: Callable[[Inputs, str, Path], None]


def _sought(path: Path) -> str:
    sought = "; ".join(f"{kind.file} ({kind.title})" for kind in KINDS)
    if not path.exists():
        known = did_you_mean(str(path), bundled_names())
        return f"no such folder or bundled TraceSet{known}; a folder must have one of: {sought}"
    if path.is_dir():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        return f"holds nothing that a report can read; looked for {sought}; got {there}"
    return f"is no file that a report can read; looked for {sought}"


def _name(inputs: Inputs, path: Path) -> str:
    """Give the name of the folder, with a number behind one that is taken."""
    name = (path.parent if path.is_file() else path).resolve().name
    taken = {given for kept in vars(inputs).values() for given in kept}
    return name if name not in taken else f"{name}-{sum(t.startswith(name) for t in taken) + 1}"


def _traces(inputs: Inputs, name: str, folder: Path) -> None:
    inputs.traces[name], inputs.folders[name] = TraceSet.read(folder), folder


def _run(inputs: Inputs, name: str, folder: Path) -> None:
    inputs.runs[name] = RunResult.read(folder)


def _replications(inputs: Inputs, name: str, folder: Path) -> None:
    told = _told(folder / "replications.json", ("name", "replications", "metrics", "provenance"))
    inputs.replications[name] = Summed(told, (load_scenario(folder / "scenario.toml"),))


def _comparison(inputs: Inputs, name: str, folder: Path) -> None:
    told = _told(folder / "comparison.json", ("baseline", "replications", "against_baseline", "provenance"))
    files = [folder / f"scenario-{index}.toml" for index in range(len(told["scenarios"]))]
    inputs.comparisons[name] = Summed(told, tuple(load_scenario(file) for file in files))


def _tuned(inputs: Inputs, name: str, folder: Path) -> None:
    file = folder / "tune.json"
    findings = TuneFindings.from_json(_text(file), str(file))
    inputs.tuned[name] = Tuned(findings, load_scenario(folder / "best.toml"))


def _cascade(inputs: Inputs, name: str, folder: Path) -> None:
    file = folder / "cascade.json"
    inputs.cascades[name] = CascadeFindings.from_json(_text(file), str(file))


def _fidelity(inputs: Inputs, name: str, folder: Path) -> None:
    inputs.fidelities[name] = read_fidelity(folder)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ReportError(f"{file}: cannot be read ({fault})") from None


def _told(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON object; `ReportError` names the first of `keys` that it lacks."""
    try:
        told = json.loads(_text(file))
    except ValueError as fault:
        raise ReportError(f"{file}: is no JSON ({fault})") from None
    missing = [key for key in keys if not isinstance(told, dict) or key not in told]
    if missing:
        raise ReportError(f"{file}: must have '{missing[0]}'; paceline writes it")
    return dict(told)


KINDS = (
    Kind("manifest.json", "a TraceSet", _traces),
    Kind("summary.json", "paceline simulate", _run),
    Kind("replications.json", "paceline simulate --replications", _replications),
    Kind("comparison.json", "paceline compare", _comparison),
    Kind("tune.json", "paceline tune", _tuned),
    Kind("cascade.json", "paceline cascade", _cascade),
    Kind("fidelity.json", "paceline validate", _fidelity),
)
"""In this order: the first whose file is there."""
