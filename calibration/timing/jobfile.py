"""The job file of a timing grid: TOML, strict, every fault told at once with its place."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.common.settings import FromList, Table
from calibration.common.toml import check, read_toml
from calibration.shapes.shapes import SHAPES
from calibration.timing.cells import Dtype, Operation, Part, StepCell

Batch = Annotated[int, Field(ge=1, le=512)]
NewTokens = Annotated[int, Field(ge=1, le=64)]
Context = Annotated[int, Field(ge=0, le=32_768)]
TreeNodes = Annotated[int, Field(ge=1, le=63)]
PromptTokens = Annotated[int, Field(ge=1, le=32_768)]


def _unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError("must not name anything twice")
    return values


class GridTable(Table):
    """One block of cells: all combinations of its lists, for every shape, type and part.

    Every list is in order of importance. Verify steps are ``batches`` x ``new_tokens`` x ``contexts``; trees
    ``batches`` x ``trees`` (drafted nodes) x ``contexts``; prefills ``prefill_batches`` x ``prefill_tokens``. With
    ``energy`` each cell is also repeated for at least a second under the device's energy counter, where it has one.
    """

    shapes: Annotated[tuple[str, ...], FromList, Field(min_length=1)]
    dtypes: Annotated[tuple[Dtype, ...], FromList, Field(min_length=1)]
    graphs: Annotated[tuple[bool, ...], FromList, Field(min_length=1)]
    parts: Annotated[tuple[Part, ...], FromList, Field(min_length=1)] = ("layer", "head", "whole")
    batches: Annotated[tuple[Batch, ...], FromList] = ()
    new_tokens: Annotated[tuple[NewTokens, ...], FromList] = ()
    contexts: Annotated[tuple[Context, ...], FromList] = ()
    trees: Annotated[tuple[TreeNodes, ...], FromList] = ()
    prefill_batches: Annotated[tuple[Batch, ...], FromList] = ()
    prefill_tokens: Annotated[tuple[PromptTokens, ...], FromList] = ()
    energy: bool = False

    _no_repetition = field_validator("*", mode="after")(
        lambda value: _unique(value) if isinstance(value, tuple) else value
    )

    @field_validator("shapes")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SHAPES:
                raise ValueError(f"no such shape, got '{name}'{did_you_mean(name, SHAPES)}")
        return names


class TimingJob(Table):
    """What to time, on what, and how long at most.

    ``budget_s``: seconds after which a run stops between two cells; what is left waits for the next run.
    ``memory_gib``: take the device for no larger than this. ``max_step_tokens``: steps of more tokens (batch x new
    tokens) are skipped, as an engine would not run them in one piece either. ``seed`` draws the weights.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    warmups: Annotated[int, Field(ge=1)] = 2
    repeats: Annotated[int, Field(ge=1)] = 5
    budget_s: Annotated[float, Field(gt=0)] | None = None
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    max_step_tokens: Annotated[int, Field(ge=1)] = 8192
    seed: Annotated[int, Field(ge=0)] = 0
    grid: Annotated[tuple[GridTable, ...], FromList, Field(min_length=1)]

    def cells(self) -> dict[StepCell, bool]:
        """Give every cell once, in the order of timing, with whether its energy is wanted.

        Tables in their order; in a table shape by shape, type by type, part by part; then the cells by the sum of
        their places in the lists, so that wherever a run stops it has timed the first entries of all lists rather
        than all entries of the first.
        """
        found: dict[StepCell, bool] = {}
        for table in self.grid:
            for shape, dtype, part in itertools.product(table.shapes, table.dtypes, table.parts):
                for cell in _cells(table, shape, part, dtype):
                    found[cell] = found.get(cell, False) or table.energy
        return found


def _cells(table: GridTable, shape: str, part: Part, dtype: Dtype) -> list[StepCell]:
    """Give the cells of one part of one shape, the most important first."""
    # A head sees neither a context nor a tree.
    contexts = table.contexts if part != "head" else table.contexts and (0,)
    ranked: list[tuple[int, StepCell]] = []

    def add(operation: Operation, batches: Any, tokens: Any, contexts: Any, tree: bool = False) -> None:
        lists = [list(enumerate(values)) for values in (table.graphs, batches, tokens, contexts)]
        for (a, graph), (b, batch), (c, new), (d, context) in itertools.product(*lists):
            nodes = new if tree and part != "head" else None
            attention: Literal["chain", "tree"] = "chain" if nodes is None else "tree"
            new_tokens = new + 1 if tree else new
            cell = StepCell(shape, part, dtype, graph, attention, operation, batch, new_tokens, context, nodes)
            ranked.append((a + b + c + d, cell))

    add("verify", table.batches, table.new_tokens, contexts)
    add("verify", table.batches, table.trees, contexts, tree=True)
    add("prefill", table.prefill_batches, table.prefill_tokens, (0,))
    return [cell for _, cell in sorted(ranked, key=lambda pair: pair[0])]


def load_timing_job(path: str | os.PathLike[str]) -> TimingJob:
    """Read the job in the TOML file at `path`; `CalibrationError` names every fault with its place."""
    return parse_timing_job(read_toml(path, CalibrationError), where=str(path))


def parse_timing_job(data: Mapping[str, Any], *, where: str = "timing job") -> TimingJob:
    """Give the job in `data`; `CalibrationError` names every fault after `where`."""
    job = check(TimingJob, data, where, CalibrationError)
    faults = [f"{where}: grid[{number}]: must name steps: {rule}" for number, rule in _empty(job)]
    if faults:
        raise CalibrationError("\n".join(faults))
    return job


def _empty(job: TimingJob) -> list[tuple[int, str]]:
    """Find tables whose lists leave nothing to time, or half of it."""
    faults = []
    for number, table in enumerate(job.grid):
        sizes = bool(table.new_tokens or table.trees)
        verify = [bool(table.batches), sizes, bool(table.contexts)]
        prefill = [bool(table.prefill_batches), bool(table.prefill_tokens)]
        if any(verify) and not all(verify):
            faults.append((number, "batches, contexts and one of new_tokens, trees go together"))
        if any(prefill) and not all(prefill):
            faults.append((number, "prefill_batches and prefill_tokens go together"))
        if not any(verify) and not any(prefill):
            faults.append((number, "batches, new_tokens and contexts, or prefill_batches and prefill_tokens"))
    return faults
