"""Read a scenario from TOML and tell every fault at once: file, place, rule, value, did you mean."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calibration.common.errors import ScenarioError, TraceError, did_you_mean
from calibration.common.settings import as_table
from calibration.common.toml import read_toml
from calibration.traces import bundled_path
from calibration.traces.traceset import read_domains, read_manifest
from simulator.scenario.routing import unknown_names
from simulator.scenario.scenario import Scenario, checked


def load_scenario(path: str | os.PathLike[str]) -> Scenario:
    """Read the scenario in the TOML file at `path`; paths in it are relative to its folder.

    Raises `ScenarioError` that names every fault with its place, also drafters and domains that the TraceSet does
    not have.
    """
    return parse_scenario(read_toml(path, ScenarioError), where=str(path), folder=Path(path).parent)


def parse_scenario(
    data: Mapping[str, Any], *, where: str = "scenario", folder: str | os.PathLike[str] = "."
) -> Scenario:
    """Give the scenario in `data`; `ScenarioError` names every fault after `where`."""
    scenario, faults = checked(data)
    faults += _trace_faults(data, Path(folder))
    faults += _missing_files(data, Path(folder))
    if faults or scenario is None:
        raise ScenarioError("\n".join(f"{where}: {fault}" for fault in faults))
    return scenario.placed(folder)


def _missing_files(data: Mapping[str, Any], folder: Path) -> list[str]:
    """Check that the files that a workload and the routing to drafters name are there."""
    load, routing = as_table(data.get("workload")), as_table(data.get("routing"))
    named = {
        "workload.path": load.get("path"),
        "workload.lengths_path": load.get("lengths_path"),
        "workload.lengths.path": as_table(load.get("lengths")).get("path"),
        "routing.drafter.path": as_table(routing.get("drafter")).get("path"),
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
        if not (root / "manifest.json").is_file():
            raise TraceError(f"{root}: no TraceSet there (no manifest.json)")
        manifest, _ = read_manifest(root)
        domains = read_domains(root, manifest)
    except TraceError as fault:
        return [f"traces: {fault}"]
    return name_faults(data, manifest.drafter_names, domains)
