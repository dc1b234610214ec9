"""Read a scenario from TOML and tell every fault at once: file, place, rule, value, did you mean."""

from __future__ import annotations

import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from calibration.errors import ScenarioError, TraceError, did_you_mean
from calibration.traces import bundled_path
from calibration.traces.manifest import parse_manifest
from simulator.routing.drafter_settings import unknown_names
from simulator.scenario import Scenario, cross_faults

_PLAIN = {
    "Input should": "must",
    "Dictionary should": "must",
    "Tuple should": "must",
    " after validation, not 0": "",
    "greater than or equal to": ">=",
    "greater than": ">",
    "less than": "<",
    "a valid dictionary or object to extract fields from": "a table",
    "a valid dictionary or instance of": "a table like",
    "a valid tuple": "a list",
    "a valid integer": "an integer",
    "a valid": "a",
}
"""Pydantic's words in a user's words."""


def load_scenario(path: str | os.PathLike[str]) -> Scenario:
    """Read the scenario in the TOML file at `path`; paths in it are relative to its folder.

    Raises `ScenarioError` that names every fault with its place, also drafters and domains that the TraceSet does
    not have.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except FileNotFoundError:
        raise ScenarioError(f"{file}: not found") from None
    except UnicodeDecodeError:
        raise ScenarioError(f"{file}: not UTF-8 text") from None
    except OSError as fault:
        raise ScenarioError(f"{file}: cannot be read ({fault.strerror})") from None
    except tomllib.TOMLDecodeError as fault:
        raise ScenarioError(f"{file}: not valid TOML ({fault})") from None
    return parse_scenario(data, where=str(file), folder=file.parent)


def parse_scenario(
    data: Mapping[str, Any], *, where: str = "scenario", folder: str | os.PathLike[str] = "."
) -> Scenario:
    """Give the scenario in `data`; `ScenarioError` names every fault after `where`."""
    scenario, faults = None, []
    try:
        scenario = Scenario.model_validate(data).placed(folder)
    except ValidationError as fault:
        faults += [_sentence(error) for error in fault.errors() if error["loc"]]
    faults += [f"{place}: {rule}" for place, rule in cross_faults(data)]
    faults += _trace_faults(data, Path(folder))
    faults += _missing_files(data, Path(folder))
    if faults or scenario is None:
        raise ScenarioError("\n".join(f"{where}: {fault}" for fault in faults))
    return scenario


def _missing_files(data: Mapping[str, Any], folder: Path) -> list[str]:
    """Check that the files that a workload names are there."""
    load = data.get("workload")
    load = load if isinstance(load, Mapping) else {}
    lengths = load.get("lengths")
    named = {
        "workload.path": load.get("path"),
        "workload.lengths_path": load.get("lengths_path"),
        "workload.lengths.path": lengths.get("path") if isinstance(lengths, Mapping) else None,
    }
    return [
        f"{place}: no such file, got '{path}'"
        for place, path in named.items()
        if isinstance(path, str) and not (folder / path).is_file()
    ]


def name_faults(data: Mapping[str, Any], drafters: Iterable[str], domains: Iterable[str]) -> list[str]:
    """Give a sentence for every drafter and domain of the (maybe unchecked) scenario that the TraceSet lacks."""
    faults = []
    for place, drafter in _drafters(data):
        name = drafter.get("name") if isinstance(drafter, Mapping) else None
        if isinstance(name, str) and name not in drafters:
            faults.append(f"{place}.name: not in the TraceSet, got '{name}'{did_you_mean(name, drafters)}")
    known = sorted(set(domains))
    for place, wanted in _domains(data):
        for domain in wanted:
            if isinstance(domain, str) and domain not in known:
                faults.append(f"{place}: not in the TraceSet, got '{domain}'{did_you_mean(domain, known)}")
    return faults + unknown_names(data, drafters, known)


def _drafters(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Give the places that choose a drafter of the scenario's TraceSet; a replica may have a TraceSet of its own."""
    replicas = data.get("replica")
    tables = list(enumerate(replicas)) if isinstance(replicas, list | tuple) else []
    return [("drafter", data.get("drafter"))] + [
        (f"replica[{number}].drafter", table.get("drafter"))
        for number, table in tables
        if isinstance(table, Mapping) and table.get("traces") is None
    ]


def _domains(data: Mapping[str, Any]) -> list[tuple[str, Iterable[Any]]]:
    """Give the places of the (maybe unchecked) scenario that name domains, with the names there."""
    traces, load = (table if isinstance(table := data.get(key), Mapping) else {} for key in ("traces", "workload"))
    wanted, mix, own = traces.get("domains"), load.get("mix"), load.get("client_domains")
    return [
        ("traces.domains", wanted if isinstance(wanted, list | tuple) else ()),
        ("workload.mix", mix if isinstance(mix, Mapping) else ()),
        ("workload.client_domains", own.values() if isinstance(own, Mapping) else ()),
    ]


def _trace_faults(data: Mapping[str, Any], folder: Path) -> list[str]:
    """Check names against the manifest and the domains only: nothing heavy is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    traces = data.get("traces")
    if not isinstance(traces, Mapping):
        return []
    bundled, path = traces.get("bundled"), traces.get("path")
    try:
        if isinstance(bundled, str):
            root = bundled_path(bundled)
        elif isinstance(path, str):
            root = folder / path
        else:
            return []
        file = root / "manifest.json"
        if not file.is_file():
            raise TraceError(f"{root}: no TraceSet there (no manifest.json)")
        manifest = parse_manifest(file.read_text(encoding="utf-8"), file)
        domains = pq.read_table(root / "sequences.parquet", columns=["domain"])["domain"].to_pylist()
    except TraceError as fault:
        return [f"traces: {fault}"]
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return []  # simulate() reads the whole set and tells what is broken in it
    return name_faults(data, manifest.drafter_names, domains)


def _sentence(error: Any) -> str:
    """Give *place: rule, got value; did you mean* for one fault that pydantic found."""
    place, sections = _walk(error["loc"])
    got = error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = {name for section in sections for name in section.model_fields}
            return f"{place}: no such key{did_you_mean(str(error['loc'][-1]), known)}"
        case "missing":
            return f"{place}: must be given"
        case "union_tag_not_found":
            choices = sorted(_tags(error["loc"]))
            return f"{place}.{error['ctx']['discriminator'].strip(chr(39))}: must be given; {_choose(choices)}"
        case "union_tag_invalid":
            tag = str(error["ctx"]["tag"])
            key = error["ctx"]["discriminator"].strip("'")
            return f"{place}.{key}: no such {key}, got '{tag}'{did_you_mean(tag, _tags(error['loc']))}"
        case "literal_error":
            known = {word.strip("'") for word in error["ctx"]["expected"].replace(" or ", ", ").split(", ")}
            return f"{place}: {_choose(sorted(known))}, got {got!r}{did_you_mean(str(got), known)}"
    rule = error["msg"].removeprefix("Value error, ")
    for words, plain in _PLAIN.items():
        rule = rule.replace(words, plain)
    return f"{place}: {rule}" + ("" if isinstance(got, Mapping | list) else f", got {got!r}")


def _choose(choices: Iterable[str]) -> str:
    return f"must be one of {', '.join(choices)}"


def _walk(loc: tuple[int | str, ...]) -> tuple[str, list[type[BaseModel]]]:
    """Follow `loc` through the models; give the place in the user's words and the models its last key could be in.

    A tag of a union ('closed') is part of pydantic's location but not of the file.
    """
    place: list[str] = []
    here: list[type[BaseModel]] = [Scenario]
    parents = here
    named = False
    for part in loc:
        tagged = [model for model in here if part in _own_tags(model)]
        if len(here) > 1 and tagged:
            here = tagged
            continue
        if isinstance(part, int) and here:  # one of a list of tables
            place[-1] += f"[{part}]"
            continue
        place.append(str(part))
        parents = here
        if named:  # the user's own word for one of several equal tables
            named = False
            continue
        annotations = [model.model_fields[str(part)].annotation for model in here if str(part) in model.model_fields]
        here = [model for annotation in annotations for model in _models(annotation)]
        named = any(_is_table(annotation) for annotation in annotations)
    return ".".join(place), parents


def _tags(loc: tuple[int | str, ...]) -> set[str]:
    """Give the tags that a union at `loc` knows."""
    # A key that no table has: the walk ends in the tables that may stand at `loc`.
    return {tag for model in _walk((*loc, ""))[1] for tag in _own_tags(model)}


def _own_tags(model: type[BaseModel]) -> tuple[str, ...]:
    for key in ("kind", "policy"):
        if key in model.model_fields:
            return typing.get_args(model.model_fields[key].annotation)
    return ()


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Give the models inside an annotation: a model, an optional one, a tagged union, or a table of equal ones."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, dict, tuple):
        return [model for argument in typing.get_args(annotation) for model in _models(argument)]
    return []


def _is_table(annotation: Any) -> bool:
    """Whether an annotation is a table whose keys the user chooses."""
    if typing.get_origin(annotation) is dict:
        return True
    return any(_is_table(argument) for argument in typing.get_args(annotation))
