"""Reading tables of per-item correctness: a row per item and stage, or a row per item; faults with their place.

What a study hands on: the frontier as rows, and the stages that each item runs.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.cascade.findings import CascadeFindings
from analysis.cascade.rules import Choice
from analysis.cascade.table import QualityTable
from analysis.common.bootstrap import Estimate
from calibration.common.arrays import Floats
from calibration.common.errors import TraceError, did_you_mean
from calibration.common.files import check_beside

if TYPE_CHECKING:
    import pandas as pd


def frontier_rows(findings: CascadeFindings) -> list[dict[str, Any]]:
    """Give every point with its 95% interval; None where there is none. Costs in the unit of the table."""
    rows = [_row(f"always {stage.name}", None, cost=stage.cost, quality=stage.quality) for stage in findings.stages]
    for curve in findings.policies:
        for point in curve.points:
            row = _row(
                curve.policy,
                point.lam,
                cost=point.cost,
                quality=point.quality,
                utility=point.utility,
                gain=point.gain,
                gain_together=point.gain_together,
                over_mixing=point.over_mixing,
                gap_closed=point.gap_closed,
            )
            for at, stage in enumerate(findings.stages):
                row[f"answered {stage.name}"] = point.answered[at].value
                row[f"ran {stage.name}"] = point.ran[at].value
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def frontier_csv(findings: CascadeFindings) -> str:
    """Give `frontier_rows` as CSV text; empty where there is no value."""
    rows = frontier_rows(findings)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _row(policy: str, lam: float | None, **estimates: Estimate) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": policy, "lambda": lam}
    for name, value in estimates.items():
        row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    return row


def runs_csv(table: QualityTable, choice: Choice) -> str:
    """Give the stages that each item runs (columns item and stages, ``small;large``; the last one answers) as CSV.

    What `simulator.cascade` replays under traffic as policy ``assigned``. Of a policy that routes, stages stand in
    the order of the table but for the one that answers: the same cost and quality, whatever order they ran in.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("item", "stages"))
    for item, ran, answer in zip(table.items, choice.ran, choice.answer.tolist(), strict=True):
        names = [name for at, name in enumerate(table.stages) if ran[at] and at != answer]
        writer.writerow((item, ";".join([*names, table.stages[answer]])))
    return out.getvalue()


_KEYS = ("item", "domain", "stage")
_ITEM = "item_"
_BUNDLED = Path(__file__).parent / "bundled"
_TRUTH = {"true": "1", "false": "0"}


def bundled_tables() -> tuple[str, ...]:
    """Names of the tables of per-item correctness that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _BUNDLED.glob("*.csv")))


def read_quality_table(
    path: str | os.PathLike[str],
    *,
    costs: Mapping[str, float] | None = None,
    stages: Sequence[str] = (),
    continued: bool = False,
) -> QualityTable:
    """Read a CSV or Parquet file, or a bundled table by name.

    Long form: a row per item and stage with ``item``, ``domain``, ``stage``, ``correct`` (0..1), ``cost`` (> 0) and
    any further numeric columns: those that begin with ``item_`` describe the item, all others are signals of the
    stage. Wide form (no ``stage`` column): a row per item with ``item``, ``domain`` and a column of correctness per
    stage, whose `costs` must then be given; ``item_`` columns as above.

    `costs`: stage -> cost, in place of the ``cost`` column. `stages`: which stages, in this order, in place of all in
    that of first appearance. `continued`: see `QualityTable`. Raises `TraceError` with file, row (as a spreadsheet
    numbers it), column, rule and value.
    """
    where = str(path)
    if where in bundled_tables() and not Path(where).exists():
        path = _BUNDLED / f"{where}.csv"
    frame, first = _read(Path(path), where)
    for column in ("item", "domain"):
        if column not in frame:
            raise TraceError(f"{where}: needs a column '{column}', got {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise TraceError(f"{where}: holds no rows")
    sheet = _Sheet(frame, where, first)
    table = (_long if "stage" in frame else _wide)(sheet, dict(costs or {}))
    table = replace(table, label=_label(Path(path)), continued=continued)
    return table.only(stages) if stages else table


@dataclass(frozen=True)
class _Sheet:
    """A file as text cells, with the place for errors; `first` is the number of its first row of data."""

    frame: pd.DataFrame
    where: str
    first: int

    def fail(self, row: int, column: str, rule: str, got: str) -> TraceError:
        return TraceError(f"{self.where}: row {row + self.first}, column '{column}': {rule}, got {got}")

    def text(self, column: str) -> list[str]:
        """A column of names, none of them empty."""
        found = [str(value) for value in self.frame[column]]
        for row, value in enumerate(found):
            if not value:
                raise self.fail(row, column, "must not be empty", "an empty cell")
        return found

    def numbers(self, column: str, low: float, high: float, rule: str, *, missing: bool = False) -> Floats:
        """A column of numbers in `low`..`high`; empty cells are NaN where `missing`, else refused."""
        import pandas as pd

        text = self.frame[column].astype(str).str.strip()
        values = pd.to_numeric(text.str.lower().replace(_TRUTH), errors="coerce").to_numpy(dtype=np.float64)
        empty = text.str.lower().isin(("", "nan", "none", "<na>")).to_numpy()
        good = np.where(empty, missing, np.isfinite(values) & (values >= low) & (values <= high))
        if not good.all():
            row = int(np.argmin(good))
            raise self.fail(row, column, rule, repr(text.iloc[row]) if text.iloc[row] else "an empty cell")
        return np.where(empty, np.nan, values)


def _read(path: Path, where: str) -> tuple[pd.DataFrame, int]:
    """The file as text cells and the number of its first row of data."""
    import pandas as pd

    if not path.is_file():
        raise TraceError(f"{where}: no such file or bundled table{did_you_mean(where, bundled_tables())}")
    try:
        data = path.read_bytes()
        check_beside(path, data, TraceError)
        if path.suffix.lower() in (".parquet", ".pq"):
            return _texts(pd.read_parquet(io.BytesIO(data))), 1
        return pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False), 2
    except (ValueError, OSError) as fault:
        raise TraceError(f"{where}: must be a CSV or Parquet file ({str(fault).splitlines()[0]})") from None


def _label(path: Path) -> str:
    """What the JSON file beside a table says its numbers are (measured, ...), else "given"."""
    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "given"
    label = about.get("label") if isinstance(about, dict) else None
    return label if isinstance(label, str) and label else "given"


def _texts(frame: pd.DataFrame) -> pd.DataFrame:
    """Cells as text, empty where there is none."""
    return frame.astype(object).where(frame.notna(), "").astype(str)


def _long(sheet: _Sheet, costs: dict[str, float]) -> QualityTable:
    frame, where = sheet.frame, sheet.where
    if "correct" not in frame:
        raise TraceError(f"{where}: needs a column 'correct', got {', '.join(frame.columns)}")
    items, domains, names = sheet.text("item"), sheet.text("domain"), sheet.text("stage")
    order = tuple(dict.fromkeys(names))
    _known(costs, order, where)
    if not set(costs).issuperset(order) and "cost" not in frame:
        raise TraceError(f"{where}: needs a column 'cost' or the costs of {', '.join(order)}, got neither")
    row_of, stage_of = list(dict.fromkeys(items)), {name: at for at, name in enumerate(order)}
    item_of = {name: at for at, name in enumerate(row_of)}
    at = (np.array([item_of[i] for i in items]), np.array([stage_of[s] for s in names]))
    _complete(sheet, at, row_of, order)
    domain = _constant(sheet, items, domains, "domain")

    def grid(values: Floats) -> Floats:
        out = np.full((len(row_of), len(order)), np.nan)
        out[at] = values
        return out

    cost = grid(sheet.numbers("cost", np.nextafter(0, 1), np.inf, "must be above 0")) if "cost" in frame else None
    signals, features = {}, {}
    for column in frame.columns:
        if column in (*_KEYS, "correct", "cost"):
            continue
        values = grid(sheet.numbers(column, -np.inf, np.inf, "must be a number or empty", missing=True))
        if column.startswith(_ITEM):
            features[column] = _one_value(values, column, row_of, where)
        else:
            signals[column] = values
    return QualityTable(
        name=where,
        items=tuple(row_of),
        domains=tuple(domain[item] for item in row_of),
        stages=order,
        correct=grid(sheet.numbers("correct", 0, 1, "must lie in 0..1")),
        cost=_priced(cost, costs, order, len(row_of)),
        signals=signals,
        item_features=features,
    )


def _wide(sheet: _Sheet, costs: dict[str, float]) -> QualityTable:
    frame, where = sheet.frame, sheet.where
    if not costs:
        raise TraceError(f"{where}: needs a column 'stage', or the cost of each column that is a stage; got neither")
    order = tuple(c for c in frame.columns if c not in _KEYS and not c.startswith(_ITEM))
    _known(costs, order, where)
    for column in order:
        if column not in costs:
            raise TraceError(f"{where}: column '{column}': must be a stage with a cost, or begin with '{_ITEM}'")
    items, domains = sheet.text("item"), sheet.text("domain")
    for row, item in enumerate(items):
        if items.index(item) != row:
            raise sheet.fail(row, "item", "must be there once", f"'{item}' again")
    features = {
        column: sheet.numbers(column, -np.inf, np.inf, "must be a number or empty", missing=True)
        for column in frame.columns
        if column.startswith(_ITEM)
    }
    correct = np.stack([sheet.numbers(stage, 0, 1, "must lie in 0..1") for stage in order], axis=1)
    cost = _priced(None, costs, order, len(items))
    return QualityTable(
        name=where,
        items=tuple(items),
        domains=tuple(domains),
        stages=order,
        correct=correct,
        cost=cost,
        signals={},
        item_features=features,
    )


def _known(costs: Mapping[str, float], stages: tuple[str, ...], where: str) -> None:
    for stage, cost in costs.items():
        if stage not in stages:
            raise TraceError(f"{where}: cost of '{stage}': no such stage{did_you_mean(stage, stages)}")
        if not (cost > 0 and np.isfinite(cost)):
            raise TraceError(f"{where}: cost of '{stage}': must be above 0, got {cost}")


def _complete(
    sheet: _Sheet, at: tuple[NDArray[np.int64], NDArray[np.int64]], items: list[str], order: tuple[str, ...]
) -> None:
    """Refuse a second row for an item and stage, and an item without one of the stages."""
    seen = np.zeros((len(items), len(order)), dtype=bool)
    for row, (i, s) in enumerate(zip(*at, strict=True)):
        if seen[i, s]:
            raise sheet.fail(row, "stage", "must be there once for an item", f"'{order[s]}' again for '{items[i]}'")
        seen[i, s] = True
    if not seen.all():
        i, s = np.argwhere(~seen)[0]
        raise TraceError(f"{sheet.where}: item '{items[i]}': must have every stage, got no row for '{order[s]}'")


def _constant(sheet: _Sheet, items: list[str], values: list[str], column: str) -> dict[str, str]:
    """The one value that each item has in all of its rows."""
    found: dict[str, str] = {}
    for row, (item, value) in enumerate(zip(items, values, strict=True)):
        if found.setdefault(item, value) != value:
            raise sheet.fail(row, column, f"must be the same in all rows of '{item}' ({found[item]})", f"'{value}'")
    return found


def _one_value(values: Floats, column: str, items: list[str], where: str) -> Floats:
    """A feature of items, which may not differ between the stages of one."""
    same = (values == values[:, :1]) | (np.isnan(values) & np.isnan(values[:, :1]))
    if not same.all():
        item = items[int(np.argmin(same.all(axis=1)))]
        raise TraceError(f"{where}: column '{column}': must be the same for all stages of '{item}'")
    return values[:, 0]


def _priced(cost: Floats | None, costs: Mapping[str, float], order: tuple[str, ...], items: int) -> Floats:
    """The cost of every item and stage: the given cost of a stage goes before its column."""
    priced = np.full((items, len(order)), np.nan) if cost is None else cost.copy()
    for at, stage in enumerate(order):
        if stage in costs:
            priced[:, at] = costs[stage]
    return priced
