"""A candidate as the exports read it, and what keeps one from being expressed in an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from analysis.tuning.findings import Scored
from calibration.common.errors import ExportError
from calibration.traces.manifest import DrafterInfo
from calibration.traces.paradigms import EAGLE, EAGLE3, MEDUSA, MODEL, paradigm_of

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
