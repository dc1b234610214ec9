"""An engine's own steps, from measured runs: read, checked to belong together, and averaged over like shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CostError, TraceError
from calibration.common.files import folder_sha256
from calibration.measured import Manifest, MeasuredRun
from calibration.measured.run import FILES, MARKER

Keys = Sequence[NDArray[Any]]
"""What makes steps alike: one value for each step in each of them."""
PARTS = 4
"""Most parts that decode steps alike are divided into by their cached tokens, so that the slope of these shows."""
_IN_PART = 16
"""Fewest steps of such a part."""
_BIN = 1.25
"""Numbers of prompt tokens within this ratio are one shape: hardly two prompts have the same length."""
_KEPT = 99.5
"""Percentile of step time / usual step time beyond which a step counts as an outlier."""
_AT_MOST = 10.0
"""Times its usual seconds that an outlier counts at most."""


@dataclass(frozen=True)
class Shapes:
    """Steps of like shape: means over `steps` of them. All token counts are sums over their sequences.

    `sequences` decode: `tokens` new (drafted ones included), `context` cached. `prompts` are prefilled:
    `prompt_tokens` computed, `prompt_context` cached. `changed`: 1 where the step before computed another number of
    tokens, else 0.
    """

    sequences: Floats
    tokens: Floats
    context: Floats
    prompts: Floats
    prompt_tokens: Floats
    prompt_context: Floats
    changed: Floats
    seconds: Floats
    steps: Floats

    def __len__(self) -> int:
        """Give the number of shapes."""
        return len(self.seconds)

    @property
    def forward_tokens(self) -> Floats:
        """Tokens that a step computes in all."""
        return self.tokens + self.prompt_tokens

    def __getitem__(self, keep: Any) -> Shapes:
        """Give the shapes that a mask or an index keeps."""
        return Shapes(*(getattr(self, one.name)[keep] for one in fields(self)))


@dataclass(frozen=True)
class EngineSteps:
    """The steps of measured runs of one engine; `names` are those of their folders.

    `table` has the columns of `calibration.measured.run.STEPS` and `run`, the index of the run of each step. Two
    are equal where they were read from the same `places` (folder, sha256 of its files).
    """

    names: tuple[str, ...]
    places: tuple[tuple[str, str], ...]
    table: pa.Table = field(compare=False, repr=False)

    def of(self, model: str, *operations: str) -> pa.Table:
        """Give the steps in which `model` did one of `operations`."""
        mine = pc.equal(self.table["model"], model)
        return self.table.filter(pc.and_(mine, pc.is_in(self.table["operation"], pa.array(operations))))

    @property
    def models(self) -> list[str]:
        """Names of the models that computed."""
        return sorted(set(self.table["model"].to_pylist()))


def read_steps(folders: Sequence[Path], where: str) -> EngineSteps:
    """Read the steps of the measured runs in `folders`; `CostError`, after `where`, for what cannot be priced from.

    The runs must be of one engine, model, device and clock.
    """
    places = tuple(_place(folder, where) for folder in folders)
    try:
        runs = [_steps_of(*place) for place in places]
    except TraceError as fault:
        raise CostError(f"{where}: {fault}") from None
    first = _identity(runs[0][0])
    for folder, (manifest, steps) in zip(folders, runs, strict=True):
        for rule, value in _identity(manifest).items():
            if value != first[rule]:
                both = f"'{first[rule]}' ({folders[0].name}) and '{value}' ({folder.name})"
                raise CostError(f"{where}: must be runs of one {rule}, got {both}")
        if steps.num_rows == 0:
            raise CostError(
                f"{where}: '{folder.name}' has no steps, only requests could be seen; give runs of an engine that "
                "was driven step by step"
            )
    tables = [steps.append_column("run", pa.array(np.full(len(steps), i))) for i, (_, steps) in enumerate(runs)]
    return EngineSteps(tuple(folder.name for folder in folders), places, pa.concat_tables(tables))


def _identity(manifest: Manifest) -> dict[str, str]:
    return {
        "engine": manifest.engine.name,
        "model": manifest.model,
        "device": manifest.device.name,
        "clock": manifest.clock,
    }


def _place(folder: Path, where: str) -> tuple[str, str]:
    if not (folder / MARKER).is_file():
        raise CostError(f"{where}: no measured run there (no {MARKER}), got '{folder}'")
    return str(folder.resolve()), folder_sha256(folder, FILES)


@functools.lru_cache(maxsize=64)
def _steps_of(folder: str, content: str) -> tuple[Manifest, pa.Table]:
    """Read a run; kept while its files do not change, as the prices of many scenarios come from the same runs."""
    run = MeasuredRun.read(folder)
    return run.manifest, run.steps


def rows_of(table: pa.Table) -> Shapes:
    """Give every step of `table` (of one model) as a shape of its own; those that computed nothing are left out."""
    columns = (
        "sequences",
        "new_tokens",
        "context_tokens",
        "prefill_sequences",
        "prefill_tokens",
        "prefill_context_tokens",
    )
    counts = [table[name].to_numpy().astype(np.float64) for name in columns]
    tokens = np.stack([table["run"].to_numpy(), table["repeat"].to_numpy(), counts[1] + counts[4]])
    changed = np.concatenate(([True], (tokens[:, 1:] != tokens[:, :-1]).any(axis=0)))[: table.num_rows]
    seconds = table["seconds"].to_numpy()
    rest = (changed.astype(np.float64), seconds, np.ones(table.num_rows))
    rows = Shapes(*[*counts, *rest])
    return rows[(rows.seconds > 0) & (rows.sequences + rows.prompts > 0)]


def shape_keys(rows: Shapes) -> Keys:
    """Give what makes two steps alike: the same numbers of sequences, prompts and new tokens, and `changed`.

    Prompt tokens count as equal within a ratio. Decode steps are also told apart by the part, by cached tokens, that
    they are in.
    """
    return [*family_keys(rows), rows.changed, _part(rows)]


def family_keys(rows: Shapes) -> Keys:
    """Give `shape_keys` but for `changed` and cached tokens."""
    binned = np.round(np.log(np.maximum(rows.prompt_tokens, 1)) / np.log(_BIN))
    return [rows.sequences, rows.tokens, rows.prompts, binned, rows.prompt_context > 0]


def _part(rows: Shapes) -> Ints:
    """Number the parts of equal size, by cached tokens, of steps that decode alike."""
    keys = (rows.context, rows.changed, rows.prompts, rows.tokens, rows.sequences)
    order = np.lexsort(keys)
    same = np.logical_and.reduce([np.diff(key[order]) == 0 for key in keys[1:]])
    first = np.flatnonzero(np.concatenate(([True], ~same)))
    sizes = np.diff(np.append(first, len(order)))
    place, size = np.arange(len(order)) - np.repeat(first, sizes), np.repeat(sizes, sizes)
    part = np.empty(len(order), dtype=np.int64)
    part[order] = place * np.clip(size // _IN_PART, 1, PARTS) // size
    return np.where(rows.prompts > 0, 0, part)


def averaged(rows: Shapes, keys: Keys) -> Shapes:
    """Give the means of `rows` over those with equal `keys`."""
    where = numbered(keys)
    number = np.bincount(where).astype(np.float64)
    means = [np.bincount(where, weights=getattr(rows, one.name)) / number for one in fields(rows)]
    return replace(Shapes(*means), steps=number)


@dataclass(frozen=True)
class Tidied:
    """Means by shape without their outliers, and with them (`raw_s`); `outliers`: what these add, see `tidied`."""

    shapes: Shapes
    raw_s: Floats
    outliers: float

    def __getitem__(self, keep: Any) -> Tidied:
        """Give it for the shapes that a mask keeps."""
        return replace(self, shapes=self.shapes[keep], raw_s=self.raw_s[keep])


def tidied(rows: Shapes, fit: Callable[[Shapes], Callable[[Shapes], Floats]]) -> Tidied:
    """Give the means of `rows` (each a step) over those of a shape, outliers taken apart.

    Usual are the median seconds of a shape (of two, the smaller), or, of a step that is alone in its shape, what a
    `fit` to the usual seconds of all shapes predicts. Beyond the 99.5th percentile of seconds / usual (of all rows
    together, below the largest) a step counts as that. What it took longer, up to ten times its usual seconds, is
    not lost: outliers are the machine's, not the shape's, but throughputs pay for them, so that `outliers` gives by
    which share to raise all prices. No single step decides a price.
    """
    keys = shape_keys(rows)
    where = numbered(keys)
    order = np.argsort(where, kind="stable")
    parts = np.split(rows.seconds[order], np.cumsum(np.bincount(where))[:-1])
    usual = np.array([np.percentile(part, 50, method="lower") for part in parts])[where]
    alone = np.bincount(where)[where] == 1
    if alone.any():
        usual = np.where(alone, fit(averaged(replace(rows, seconds=usual), keys))(rows), usual)
    ratio = rows.seconds / usual
    kept = np.minimum(ratio, np.percentile(ratio, _KEPT, method="lower"))
    beyond = np.maximum(np.minimum(ratio, _AT_MOST) - kept, 0)
    shapes = averaged(replace(rows, seconds=kept * usual), keys)
    return Tidied(shapes, averaged(rows, keys).seconds, float(beyond.sum() / kept.sum()))


def numbered(keys: Keys) -> Ints:
    """Give every step the number of its `keys`."""
    found = np.unique(np.stack(list(keys), axis=1), axis=0, return_inverse=True)[1]
    return np.asarray(found, dtype=np.int64).ravel()
