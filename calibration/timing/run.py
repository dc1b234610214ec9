"""Run a timing job: every cell of its grid on one device, resumable, within a budget, never out of memory.

The folder of a timing job in progress: finished cells in numbered parts, each written whole or not at all.

What a step needs of a device's memory, estimated before anything is allocated. No torch needed.
"""

from __future__ import annotations

import datetime
import itertools
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from calibration.common.errors import CalibrationError, require
from calibration.common.files import begin_job, whole_folder
from calibration.common.progress import StageProgress
from calibration.common.version import paceline_version
from calibration.models.clock import energy_j
from calibration.models.load import choose_device
from calibration.shapes.shapes import SHAPES, Shape
from calibration.timing.gridfile import (
    TABLES,
    GridManifest,
    MissingCells,
    StepCell,
    StepGrid,
    TimingJob,
    cells_of,
    element_size,
    grid_table,
    layer_bytes,
    timed_layers,
)

if TYPE_CHECKING:
    import torch

    from calibration.timing.bench import Bench

FLUSH_S = 20.0
"""Finished cells are written at least this often, so a killed run loses no more than that."""


@dataclass
class Parts:
    """``<out>.partial/``: what a job has timed so far, with the identity of the job that may go on from it."""

    folder: Path
    _waiting: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in TABLES})
    _written: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> Parts:
        """Open `folder` for the job `identity`, or begin it; `CalibrationError` where another job began it."""
        begin_job(folder, identity)
        return cls(folder)

    def add(self, steps: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> None:
        """Take in the rows of a finished cell; they are written with the next part."""
        self._waiting["steps"] += steps
        self._waiting["skipped"] += skipped
        if time.monotonic() - self._written >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what waits as the next part."""
        if any(self._waiting.values()):
            with whole_folder(self.folder / f"part-{len(self._folders()):05d}") as scratch:
                for name, rows in self._waiting.items():
                    pq.write_table(grid_table(name, rows), scratch / f"{name}.parquet", compression="zstd")
            self._waiting = {name: [] for name in TABLES}
        self._written = time.monotonic()

    def tables(self) -> dict[str, pa.Table]:
        """Give the rows of all written parts, by table."""
        return {
            name: pa.concat_tables(
                [grid_table(name, []), *(pq.read_table(folder / f"{name}.parquet") for folder in self._folders())]
            )
            for name in TABLES
        }

    def cells(self) -> set[StepCell]:
        """Give the cells of all written parts: timed or skipped."""
        return {cell for table in self.tables().values() for cell in cells_of(table)}

    def remove(self) -> None:
        """Delete the folder; the job is complete."""
        shutil.rmtree(self.folder)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("part-*"))


USABLE = 0.94
"""Share of the free memory that a step may take; the rest is for the allocator and the libraries' workspaces."""


def weight_bytes(shape: Shape, cell: StepCell, layers: int) -> int:
    """Give the bytes of the weights that a step of `cell` over `layers` decoder layers holds; exact."""
    outside = 0 if cell.part == "layer" else shape.head_parameters * element_size(cell.dtype)
    return layers * layer_bytes(shape, cell.dtype) + outside


def cache_bytes(shape: Shape, cell: StepCell, layers: int) -> int:
    """Give the bytes of the KV cache of `cell`, its new tokens included; exact."""
    slots = cell.batch * (cell.context_tokens + cell.new_tokens)
    return layers * 2 * slots * shape.kv_width * element_size(cell.dtype)


def working_bytes(shape: Shape, cell: StepCell, layers: int) -> int:
    """Give the bytes of what lives for a step only: activations, tree mask, logits; approximate, from above."""
    tokens, size = cell.batch * cell.new_tokens, element_size(cell.dtype)
    total = 4 * tokens * shape.hidden * size
    if layers:
        total += tokens * (4 * (shape.query_width + 2 * shape.kv_width) + 4 * shape.intermediate) * size
        if cell.attention == "tree":
            rows = cell.new_tokens * shape.heads // shape.kv_heads
            total += 2 * rows * (cell.context_tokens + cell.new_tokens) * size
    if cell.part != "layer":
        scored = cell.batch if cell.operation == "prefill" else tokens
        total += 2 * scored * shape.vocabulary * size
    return total


def step_bytes(shape: Shape, cell: StepCell, layers: int) -> int:
    """Give the bytes that a step of `cell` over `layers` decoder layers needs in all."""
    held = weight_bytes(shape, cell, layers) + cache_bytes(shape, cell, layers)
    return held + working_bytes(shape, cell, layers)


def too_large(shape: Shape, cell: StepCell, layers: int, free_bytes: int | None) -> str | None:
    """Say why `cell` does not fit `free_bytes`, or None where it does (or where the free memory is not known)."""
    if free_bytes is None or step_bytes(shape, cell, layers) <= USABLE * free_bytes:
        return None
    weights, cache, working = (f(shape, cell, layers) / 2**30 for f in (weight_bytes, cache_bytes, working_bytes))
    return (
        f"memory: needs {weights:.2f} GiB of weights + {cache:.2f} of KV cache + {working:.2f} to work, "
        f"{free_bytes / 2**30:.2f} GiB are free"
    )


Row = dict[str, Any]

NOTES = (
    "steps run random weights in torch: fused attention kernels, one matrix product for queries, keys and values and "
    "one for gate and up, everything else unfused; a serving engine may be faster",
    "layer rows: a few decoder layers in one step (column layers), seconds for all of them; head rows: embedding, "
    "final norm, LM head and the choice of the largest logit",
    "fp8: e4m3 weights and inputs of the layers' matrices with one fixed scale a tensor; embedding, head, KV cache "
    "and attention in bf16",
    "tree rows: attention with an explicit mask; a chain on a CUDA device in 16 bits leaves the causal order to the "
    "attention kernel",
)


def time_shapes(job: TimingJob, out: str | Path, progress: StageProgress | None = None) -> StepGrid:
    """Time every cell of `job` with random weights; write the timing grid to the folder `out` and give it.

    ``progress("time shapes", done, total)`` is called after every cell. Finished cells are kept in
    ``<out>.partial/``: an interrupted job goes on from there. Where the job's budget runs out, `out` holds what there
    is, its manifest and `StepGrid.complete` say what is missing, and the next call with the same job goes on. Cells
    that the free memory cannot hold are not tried, and an allocation that fails all the same costs its cell only:
    both are listed in the table ``skipped`` with the reason.

    Raises:
        CalibrationError: the device cannot run what the job asks for (fp8, CUDA graphs); `out` holds other files;
            ``<out>.partial`` holds another job, or one of another device or torch.
        MissingExtraError: torch is not installed.
    """
    begin = time.monotonic()
    torch = require("torch")
    from calibration.traces.surroundings import device_info

    device = choose_device(job.device)
    plan = job.cells()
    _check_device(plan, device)
    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "manifest.json").is_file()):
        raise CalibrationError(f"{target}: must be new, empty or an older timing grid; it holds something else")
    identity = {
        "job": job.model_dump(mode="json", exclude={"budget_s"}),
        "device": device_info(device).name,
        "torch": torch.__version__,
    }
    parts = Parts.open(target.with_name(target.name + ".partial"), identity)
    try:
        _Run(job, plan, device, parts, begin, progress or (lambda stage, done, total: None)).go()
    finally:
        parts.flush()
    grid = _grid(job, plan, device, parts.tables())
    grid.write(target)
    if grid.complete:
        parts.remove()
    return grid


@dataclass
class _Run:
    """One call's work through the plan. ``bench`` holds the weights of the cells at hand, once they are drawn."""

    job: TimingJob
    plan: dict[StepCell, bool]
    device: torch.device
    parts: Parts
    begin: float
    progress: StageProgress
    bench: Bench | None = None

    def go(self) -> None:
        """Time the cells that are not finished yet, group by group, until all are or the budget is spent."""
        finished = self.parts.cells()
        done, total = len(finished), len(self.plan)
        self.progress("time shapes", done, total)
        todo = [cell for cell in self.plan if cell not in finished]
        for _, cells in itertools.groupby(todo, key=lambda cell: cell.group):
            for steps, skipped in self._group(list(cells)):
                self.parts.add(steps, skipped)
                done += 1
                self.progress("time shapes", done, total)
                if self.job.budget_s is not None and time.monotonic() - self.begin >= self.job.budget_s:
                    return

    def _group(self, cells: list[StepCell]) -> Iterator[tuple[list[Row], list[Row]]]:
        """Time cells that share weights; give the step rows and the skipped rows of one cell after the other."""
        from calibration.timing.bench import free_memory_bytes, last_cache_bytes

        self.bench = None
        free = free_memory_bytes(self.device)
        if self.job.memory_gib is not None:
            limit = int(self.job.memory_gib * 2**30)
            free = limit if free is None else min(free, limit)
        shape = SHAPES[cells[0].shape]
        layers = timed_layers(shape, cells[0].part, cells[0].dtype, last_cache_bytes(self.device))
        unbuilt: str | None = None
        for cell in cells:
            reason, rows = self._too_many(cell) or too_large(shape, cell, layers, free) or unbuilt, []
            if reason is None:
                rows = self._attempt(cell, layers)
                reason = None if rows else "memory: an allocation failed"
                unbuilt = reason if self.bench is None else None
            yield rows, [] if reason is None else [{**cell.row(), "reason": reason}]

    def _too_many(self, cell: StepCell) -> str | None:
        tokens = cell.batch * cell.new_tokens
        if tokens <= self.job.max_step_tokens:
            return None
        return f"tokens: {tokens} in the step exceed max_step_tokens = {self.job.max_step_tokens}"

    def _attempt(self, cell: StepCell, layers: int) -> list[Row]:
        """Give the rows of `cell`, none where an allocation failed; what that held is free again."""
        from calibration.timing.bench import Bench, free_memory_bytes, is_out_of_memory

        try:
            if self.bench is None:
                self.bench = Bench.build(
                    SHAPES[cell.shape], cell.part, cell.dtype, self.device, self.job.seed, layers
                )
            return self._time(self.bench, cell)
        except RuntimeError as fault:
            if not is_out_of_memory(fault):
                raise
        free_memory_bytes(self.device)  # only now is the fault gone, and with it the frames that held tensors
        return []

    def _time(self, bench: Bench, cell: StepCell) -> list[Row]:
        """Time one cell; its repeats follow at once, since its cache and its graph may fill the device."""
        step = bench.timed(cell)
        for _ in range(self.job.warmups):
            step()
        seconds = [step() for _ in range(self.job.repeats)]
        joules = energy_j(step, self.device) if self.plan[cell] else None
        return [
            {**cell.row(), "layers": len(bench.layers), "repeat": repeat, "seconds": value, "joules": joules}
            for repeat, value in enumerate(seconds)
        ]


def _check_device(plan: dict[StepCell, bool], device: torch.device) -> None:
    """Refuse a job that the device cannot run, before anything is built; `CalibrationError` with every reason."""
    from calibration.models.fp8 import fp8_fault
    from calibration.timing.bench import graph_fault

    faults = []
    if any(cell.graph for cell in plan) and (fault := graph_fault(device)):
        faults.append(f"graphs: {fault}; leave true out")
    if any(cell.dtype == "fp8" for cell in plan) and (fault := fp8_fault(device)):
        faults.append(f"dtypes: {fault}")
    if faults:
        raise CalibrationError("\n".join(faults))


def _grid(job: TimingJob, plan: dict[StepCell, bool], device: torch.device, tables: dict[str, pa.Table]) -> StepGrid:
    """Put the parts together in the order of the plan."""
    from calibration.traces.surroundings import device_info, software_versions

    order = {cell: number for number, cell in enumerate(plan)}
    sorted_tables = {name: _in_order(table, order) for name, table in tables.items()}
    finished = {cell for table in tables.values() for cell in cells_of(table)}
    missing = Counter(cell.group for cell in plan if cell not in finished)
    names = dict.fromkeys(cell.shape for cell in plan)
    manifest = GridManifest(
        paceline_version=paceline_version(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=device_info(device),
        software=software_versions(),
        job=job.model_dump(mode="json"),
        shapes=tuple(SHAPES[name] for name in names),
        missing=tuple(
            MissingCells(shape=shape, part=part, dtype=dtype, cells=count)
            for (shape, part, dtype), count in missing.items()
        ),
        notes=NOTES,
    )
    return StepGrid.build(manifest, sorted_tables["steps"], sorted_tables["skipped"])


def _in_order(table: pa.Table, order: dict[StepCell, int]) -> pa.Table:
    """Sort rows by the place of their cell; the rows of a cell stay as they are."""
    import numpy as np

    distinct = cells_of(table)
    if not distinct:
        return table
    key = [StepCell(**row) for row in table.select(list(distinct[0].row())).to_pylist()]
    return table.take(np.argsort([order[cell] for cell in key], kind="stable"))
