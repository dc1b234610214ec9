"""Grade models on items: who answers rightly, with which signals, at which cost. Needs the extra ``calibration``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.common.errors import CalibrationError
from calibration.common.files import TABLE_SHA256, sha256, write_whole
from calibration.common.progress import StageProgress
from calibration.common.secrets import without_secrets
from calibration.common.version import paceline_version
from calibration.grading.builtin import Item, builtin_items, digest, read_items
from calibration.grading.table import Grade, grade, paired, summary, to_csv
from calibration.models.load import DeviceChoice, DtypeChoice, Verifier, load_verifier

TIMED_ITEMS = 60
"""Items whose seconds are measured, spread evenly over all of them."""
BUILTIN = "builtin"


@dataclass(frozen=True)
class GradingSettings:
    """What is graded: the `exits` of one verifier and that model itself, or several `models`, cheapest first.

    `items`: ``builtin`` or a JSONL file; `seed` draws the built-in ones. `limit_per_domain` keeps the first so many.
    """

    verifier: str | None = None
    exits: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    items: str = BUILTIN
    seed: int = 0
    limit_per_domain: int | None = None
    batch_size: int = 16
    timed_items: int = TIMED_ITEMS
    device: DeviceChoice = "auto"
    dtype: DtypeChoice = "auto"
    command: str | None = None


@dataclass(frozen=True)
class Grading:
    """A finished grading: the grades by item and stage, seconds per stage, and all that the manifest says."""

    grades: tuple[Grade, ...]
    costs: dict[str, float]
    manifest: dict[str, Any]


def run_grading(settings: GradingSettings, progress: StageProgress | None = None) -> Grading:
    """Grade every item at every stage; `progress` hears (stage, done, total).

    Raises:
        CalibrationError: items or models cannot be used, or exits do not fit the verifier.
        MissingExtraError: the extra ``calibration`` is not installed.
    """
    items = _items(settings)
    names = _named(settings)
    grades: list[Grade] = []
    costs: dict[str, float] = {}
    told: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for name in names:
        verifier = load_verifier(name, device=settings.device, dtype=settings.dtype, progress=progress)
        stages = _stages(verifier, settings.exits, several=len(names) > 1)
        if taken := set(stages) & set(costs):
            raise CalibrationError(f"models: must have a name of its own each, got '{taken.pop()}' twice")
        found, seconds, about = _one(verifier, stages, items, settings, progress)
        grades += found
        costs |= seconds
        told.append({**verifier.info.model_dump(), "provenance": verifier.provenance, "stages": stages})
        del verifier
    order = {stage: place for place, stage in enumerate(costs)}
    place = {item.id: n for n, item in enumerate(items)}
    grades.sort(key=lambda g: (place[g.item.id], order[g.stage]))
    manifest = {
        "label": "measured",
        "models": told,
        "stages": {name: {"cost_s": float(f"{costs[name]:.5g}"), **rates} for name, rates in _told(grades, costs)},
        "neighbours": paired(grades, list(costs)),
        "items": {"source": _source(settings), "count": len(items), "sha256": digest(items)},
        **about,
        "command": None if settings.command is None else without_secrets(settings.command),
        "paceline_version": paceline_version(),
    }
    return Grading(tuple(grades), costs, manifest)


def write_grading(grading: Grading, path: str | Path) -> Path:
    """Write the table to `path` (.csv) and its manifest beside it (.json); each appears whole or not at all."""
    target = Path(path)
    if target.suffix != ".csv":
        raise CalibrationError(f"out: must end in .csv, got '{target.name}'")
    table = to_csv(grading.grades, grading.costs)
    told = {**grading.manifest, TABLE_SHA256: sha256(table.encode())}
    write_whole(target.with_suffix(".json"), json.dumps(told, indent=2) + "\n")
    write_whole(target, table)
    return target


def _told(grades: Sequence[Grade], costs: dict[str, float]) -> list[tuple[str, dict[str, Any]]]:
    return list(summary(grades, list(costs)).items())


def _source(settings: GradingSettings) -> str:
    return f"builtin, seed {settings.seed}" if settings.items == BUILTIN else Path(settings.items).name


def _items(settings: GradingSettings) -> tuple[Item, ...]:
    items = builtin_items(settings.seed) if settings.items == BUILTIN else read_items(settings.items)
    if settings.limit_per_domain is None:
        return items
    kept: list[Item] = []
    for domain in dict.fromkeys(item.domain for item in items):
        kept += [item for item in items if item.domain == domain][: settings.limit_per_domain]
    return tuple(kept)


def _named(settings: GradingSettings) -> tuple[str, ...]:
    """Give the models to load; `CalibrationError` where the settings do not give stages."""
    if (settings.verifier is None) == (not settings.models):
        raise CalibrationError("grade: must have either a verifier with exits, or models")
    if settings.verifier is not None:
        if not settings.exits:
            raise CalibrationError("exits: must name a number of layers or more beside a verifier, got none")
        return (settings.verifier,)
    if settings.exits:
        raise CalibrationError("exits: belong to a verifier, got them beside models")
    if len(settings.models) < 2:
        raise CalibrationError(f"models: must be two or more, got {len(settings.models)}")
    return settings.models


def _stages(verifier: Verifier, exits: Sequence[int], *, several: bool) -> dict[str, int]:
    """Give the stages of one model and their layers: exits by rising depth, and the model itself as the last."""
    whole: int = verifier.model.config.num_hidden_layers
    if several:
        return {verifier.info.name: whole}
    for layers in exits:
        if not 1 <= layers <= whole:
            raise CalibrationError(f"exits: must lie in [1, {whole}], the layers of the verifier, got {layers}")
    return {verifier.info.name if n == whole else f"exit-{n}": n for n in sorted({*exits, whole})}


def _one(
    verifier: Verifier,
    stages: dict[str, int],
    items: Sequence[Item],
    settings: GradingSettings,
    progress: StageProgress | None,
) -> tuple[list[Grade], dict[str, float], dict[str, Any]]:
    """Give grades and seconds of the stages of one model, and how they were measured."""
    from calibration.grading.cost import clock_name, stage_seconds
    from calibration.grading.scoring import PROMPT, pack, score
    from calibration.traces.surroundings import device_info, software_versions

    layers = list(stages.values())
    packed = [pack(verifier.tokenizer, item) for item in items]
    graded = _Bar(progress, f"grade {verifier.info.name}", len(items))
    scores = score(
        verifier.model,
        packed,
        [item.right for item in items],
        layers,
        batch_size=settings.batch_size,
        advance=graded.add,
    )
    chosen = packed[:: -(-len(packed) // max(settings.timed_items, 1))]
    timed = _Bar(progress, f"time {verifier.info.name}", len(chosen))
    seconds = stage_seconds(verifier.model, chosen, layers, timed.add)
    grades = [
        grade(
            item,
            stage,
            scores.log_likelihood[s][i],
            bool(scores.exact[s, i]),
            int(scores.prompt_tokens[i]),
        )
        for i, item in enumerate(items)
        for s, stage in enumerate(stages)
    ]
    about = {
        "prompt": PROMPT,
        "scoring": "likeliest option by summed log-probability of its tokens, not normalised by length",
        "cost": "median seconds of a stage to grade one item alone, each stage from nothing",
        "cost_clock": clock_name(verifier.device),
        "timed_items": len(chosen),
        "device": device_info(verifier.device).model_dump(exclude_none=True),
        "software": software_versions(("torch", "transformers", "numpy")),
    }
    return grades, dict(zip(stages, seconds, strict=True)), about


class _Bar:
    """Adds up what is done for a progress bar."""

    def __init__(self, progress: StageProgress | None, name: str, total: int) -> None:
        self._progress, self._name, self._total, self._done = progress, name, total, 0

    def add(self, number: int) -> None:
        """Count `number` more."""
        self._done += number
        if self._progress is not None:
            self._progress(self._name, self._done, self._total)
