"""What a study hands on: the frontier as rows, and the stages that each item runs."""

from __future__ import annotations

import csv
import io
from typing import Any

from analysis.cascade.findings import CascadeFindings
from analysis.cascade.rules import Choice
from analysis.cascade.table import QualityTable
from analysis.common.bootstrap import Estimate


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
