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
from simulator.scenario import Scenario, cross_faults


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
    if faults or scenario is None:
        raise ScenarioError("\n".join(f"{where}: {fault}" for fault in faults))
    return scenario


def name_faults(data: Mapping[str, Any], drafters: Iterable[str], domains: Iterable[str]) -> list[str]:
    """Give a sentence for every drafter and domain of the (maybe unchecked) scenario that the TraceSet lacks."""
    faults = []
    drafter = data.get("drafter")
    name = drafter.get("name") if isinstance(drafter, Mapping) else None
    if isinstance(name, str) and name not in drafters:
        faults.append(f"drafter.name: not in the TraceSet, got '{name}'{did_you_mean(name, drafters)}")
    traces = data.get("traces")
    wanted = traces.get("domains") if isinstance(traces, Mapping) else None
    known = sorted(set(domains))
    for domain in wanted if isinstance(wanted, list | tuple) else ():
        if isinstance(domain, str) and domain not in known:
            faults.append(f"traces.domains: not in the TraceSet, got '{domain}'{did_you_mean(domain, known)}")
    return faults


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
    rule = error["msg"].replace("Input should", "must").removeprefix("Value error, ")
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
    for part in loc:
        tagged = [model for model in here if part in _own_tags(model)]
        if len(here) > 1 and tagged:
            here = tagged
            continue
        place.append(str(part))
        parents = here
        fields = [model.model_fields[str(part)] for model in here if str(part) in model.model_fields]
        here = [model for field in fields for model in _models(field.annotation)]
    return ".".join(place), parents


def _tags(loc: tuple[int | str, ...]) -> set[str]:
    """Give the tags that a union at `loc` knows."""
    here: list[type[BaseModel]] = [Scenario]
    for part in loc:
        fields = [model.model_fields[str(part)] for model in here if str(part) in model.model_fields]
        here = [model for field in fields for model in _models(field.annotation)]
    return {tag for model in here for tag in _own_tags(model)}


def _own_tags(model: type[BaseModel]) -> tuple[str, ...]:
    for key in ("kind", "policy"):
        if key in model.model_fields:
            return typing.get_args(model.model_fields[key].annotation)
    return ()


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Give the models inside an annotation: a model, an optional one, or a tagged union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models(argument)]
    return []
