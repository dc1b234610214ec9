"""Which drafter is the generalist and which are specialists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analysis.knowledge.findings import Student
from calibration.common.errors import ReplayError, did_you_mean
from calibration.traces import DrafterInfo, TraceSet


def cast(
    traces: TraceSet, generalist: str | None, specialists: Mapping[str, str] | None
) -> tuple[Student, tuple[Student, ...]]:
    """Give the generalist and the specialists of `traces`; `specialists` maps names to home domains.

    Left out, they are read from the manifest: specialists are distilled drafters that trained on one domain, the
    generalist the one drafter of their parameter count that trained on several. Raises `ReplayError` where that is
    not clear, or a name or domain is not in the TraceSet.
    """
    infos = {info.name: info for info in traces.manifest.drafters}
    served = set(traces.sequences["domain"].to_pylist())
    if specialists is None:
        found = {name: _domains(info) for name, info in infos.items()}
        specialists = {name: of[0] for name, of in found.items() if len(of) == 1}
        if not specialists:
            raise ReplayError("knowledge: no drafter says that it trained on one domain alone; name the specialists")
    for name, domain in specialists.items():
        if name not in infos:
            raise ReplayError(f"specialists: not in the TraceSet, got '{name}'{did_you_mean(name, infos)}")
        if domain not in served:
            raise ReplayError(f"specialists.{name}: no such domain, got '{domain}'{did_you_mean(domain, served)}")
    if generalist is None:
        sizes = {infos[name].parameters for name in specialists}
        alike = [n for n, info in infos.items() if len(_domains(info)) > 1 and {info.parameters} == sizes]
        if len(alike) != 1:
            got = ", ".join(alike) or "none"
            raise ReplayError(
                "knowledge: exactly one drafter of the specialists' size must have trained on several domains, got "
                f"{got}; name the generalist"
            )
        generalist = alike[0]
    if generalist not in infos:
        raise ReplayError(f"generalist: not in the TraceSet, got '{generalist}'{did_you_mean(generalist, infos)}")
    if generalist in specialists:
        raise ReplayError(f"generalist: must not be one of the specialists, got '{generalist}'")
    homes = sorted(specialists.items(), key=lambda item: (item[1], item[0]))
    if len({domain for _, domain in homes}) < len(homes):
        raise ReplayError("specialists: each domain must have one specialist at most")
    return _student(infos[generalist], None), tuple(_student(infos[name], domain) for name, domain in homes)


def _recipe(info: DrafterInfo) -> Mapping[str, Any]:
    recipe = info.settings.get("recipe") if isinstance(info.settings, Mapping) else None
    return recipe if isinstance(recipe, Mapping) else {}


def _domains(info: DrafterInfo) -> list[str]:
    """Give the domains that a drafter says it trained on."""
    domains = _recipe(info).get("domains")
    return [str(name) for name in domains] if isinstance(domains, list | tuple) else []


def _student(info: DrafterInfo, home: str | None) -> Student:
    recipe = _recipe(info)
    texts, tokens = (recipe.get(key) if isinstance(recipe.get(key), int) else None for key in ("texts", "tokens"))
    return Student(info.name, home, info.parameters, texts, tokens)
