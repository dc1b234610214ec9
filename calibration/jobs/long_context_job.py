"""The long-context study of a recording job: acceptance against context and window, in a table beside the TraceSet.

A TraceSet's folder holds its own files alone, so the table is ``<out>-long-context.csv`` (columns: the fields of
`calibration.jobs.long_context.WindowRow`). ``<out>-long-context.json`` says what it was measured with; where that is
what is asked for, the study is not run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from calibration.common.errors import CalibrationError
from calibration.common.files import write_whole
from calibration.common.progress import StageProgress
from calibration.common.settings import Count, FromList, Natural, Table
from calibration.prompts import load_prompts, read_prompt_file

if TYPE_CHECKING:
    from calibration.drafters.lanes import ModelDrafter
    from calibration.jobs.long_context import WindowRow
    from calibration.models.drafter import Drafter
    from calibration.models.load import Verifier


class WindowTable(Table):
    """One window to try, as in kind "windowed"; without ``recent`` it is the whole context."""

    sink: Natural = 0
    recent: Count | None = None
    memory: Natural = 0
    prefill: Literal["whole", "window"] = "whole"

    @model_validator(mode="after")
    def _whole_or_window(self) -> Self:
        if self.recent is None and (self.sink or self.memory or self.prefill == "window"):
            raise ValueError("recent must be given where sink, memory or prefill is")
        return self


class LongContextTable(Table):
    """Acceptance of one drafter after long prompts, by window (MASW, our reading): ``<out>-long-context.csv``.

    ``drafter``: the name of one of the job's drafters, a causal LM without a window of its own. Each prompt fills one
    of the ``contexts`` (tokens) with passages in random order and a task about one of them. The passages are the
    prompts of a ``file`` of your own (.toml or .jsonl), else the bundled ones, of some ``domains``. The verifier
    writes ``new_tokens`` after each, greedily. ``gamma`` caps the run lengths. ``memory_queries`` last tokens of the
    prompt choose the memory blocks by their attention in layer ``memory_layer`` (from 0; none: all layers). It runs
    once the prompts are recorded, and not again while its settings stay the same.
    """

    drafter: str
    contexts: Annotated[tuple[Count, ...], FromList, Field(min_length=1)] = (2048, 4096, 8000)
    prompts_per_context: Count = 4
    file: str | None = None
    domains: Annotated[tuple[str, ...], FromList, Field(min_length=1)] | None = None
    new_tokens: Annotated[int, Field(ge=2)] = 48
    gamma: Count = 4
    memory_queries: Count = 32
    memory_layer: Natural | None = None
    window: Annotated[tuple[WindowTable, ...], FromList, Field(min_length=1)]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name, given in (("contexts", self.contexts), ("window", self.window)):
            if len(set(given)) != len(given):
                raise ValueError(f"{name} must be unique, got one twice")
        return self

    def placed(self, folder: Path) -> Self:
        """Give the settings with a relative ``file`` begun at `folder`."""
        return self if self.file is None else self.model_copy(update={"file": str(folder / self.file)})


@dataclass(frozen=True)
class LongContextStudy:
    """A study that can run: settings, models, and prompts by context (token ids)."""

    settings: LongContextTable
    verifier: Verifier
    drafter: ModelDrafter
    prompts: dict[int, list[list[int]]]

    def run(self, out: Path, progress: StageProgress | None = None) -> Path:
        """Measure, unless the table beside the TraceSet `out` holds the same already; give the table's path.

        The table is written whole or not at all. `progress` is called for the stage "long contexts".
        """
        table = long_context_path(out)
        note, identity = table.with_suffix(".json"), self._identity()
        if not (table.is_file() and _read(note) == identity):
            from calibration.jobs.long_context import save_windows

            rows = self._measure(progress)
            # Without its note the table counts as not measured, so an interruption between the two does no harm.
            note.unlink(missing_ok=True)
            save_windows(rows, table)
            write_whole(note, json.dumps(identity, indent=2) + "\n")
        return table

    def _measure(self, progress: StageProgress | None) -> list[WindowRow]:
        from calibration.jobs.long_context import WindowChoice, window_study

        told = self.settings
        return window_study(
            self.verifier,
            self.drafter,
            self.prompts,
            [WindowChoice(**window.model_dump()) for window in told.window],
            new_tokens=told.new_tokens,
            gamma=told.gamma,
            queries=told.memory_queries,
            layer=told.memory_layer,
            progress=progress,
        )

    def _identity(self) -> dict[str, Any]:
        """Everything that decides what the table holds; the prompts' hash stands for passages and seed."""
        found = {
            "settings": self.settings.model_dump(exclude={"file"}),
            "prompts_sha256": hashlib.sha256(json.dumps(list(self.prompts.items())).encode()).hexdigest(),
            "verifier": self.verifier.info.model_dump(),
            "drafter": self.drafter.info.model_dump(),
            "device_kind": self.verifier.device.type,
        }
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def prepare_study(
    settings: LongContextTable, verifier: Verifier, drafters: Sequence[Drafter], seed: int
) -> LongContextStudy:
    """Choose the drafter and write the prompts of the study, with random numbers of `seed`.

    `CalibrationError`: the drafter cannot have a window, a context is beyond the verifier's positions, or too short
    for the passages; told before anything is computed.
    """
    drafter = _lane(settings, drafters)
    limit = getattr(verifier.model.config, "max_position_embeddings", None)
    most = max(settings.contexts) + settings.new_tokens
    if limit is not None and most > limit:
        rule = f"with new_tokens they must fit into the verifier's {limit} positions"
        raise CalibrationError(f"long_context.contexts: {rule}, got {most}")
    return LongContextStudy(settings, verifier, drafter, _prompts(settings, verifier, seed))


def long_context_path(out: Path | str) -> Path:
    """Give the path of the table that belongs to the TraceSet `out`."""
    return Path(out).with_name(f"{Path(out).name}-long-context.csv")


def _lane(settings: LongContextTable, drafters: Sequence[Drafter]) -> ModelDrafter:
    from calibration.drafters.lanes import ModelDrafter

    drafter = next(each for each in drafters if each.name == settings.drafter)
    if not isinstance(drafter, ModelDrafter) or drafter.window is not None:
        rule = "must be a causal LM that sees tokens alone, all of them (early-exit, layer-skip, standalone ...)"
        raise CalibrationError(f"long_context.drafter: {rule}, got '{drafter.name}' ({drafter.info.paradigm})")
    layers = drafter.model.config.num_hidden_layers
    if settings.memory_layer is not None and settings.memory_layer >= layers:
        rule = f"must be less than the drafter's {layers} layers"
        raise CalibrationError(f"long_context.memory_layer: {rule}, got {settings.memory_layer}")
    return drafter


def _prompts(settings: LongContextTable, verifier: Verifier, seed: int) -> dict[int, list[list[int]]]:
    """Write the prompts; each has random numbers of its own, whatever other contexts there are."""
    from calibration.jobs.long_context import long_prompt

    try:
        files = (
            load_prompts(settings.domains)
            if settings.file is None
            else read_prompt_file(settings.file, settings.domains)
        )
        passages = [prompt.text for file in files for prompt in file.prompts]
        return {
            context: [
                long_prompt(verifier, passages, context, np.random.default_rng((seed, context, number)))
                for number in range(settings.prompts_per_context)
            ]
            for context in settings.contexts
        }
    except CalibrationError as fault:
        raise CalibrationError(f"long_context: {fault}") from None


def _read(note: Path) -> Any:
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
