"""The page on the roofline: errors of its times and joules on public tables, from the tables themselves.

``python -m studies.pages.roofline FOLDER > docs/roofline.md``, with the folder of the public measurements.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

_TOP = """# The roofline, and how far to trust it

`[costs.verifier] kind = "roofline"` prices a step of a published model on a catalogued device from its shape: FLOPs
and bytes of every matrix product, attention over cached tokens with grouped queries, all-reduces, kernel launches,
host time. The shares of the device's peaks that these reach are *fitted* to public tables of the H100; what such a
price leaves (another device, type of number or size) is *extrapolated* and says so in `summary.json`. Joules go the
same way. This page is written by `python -m studies.pages.roofline`.

Errors are mean absolute relative errors (MAPE). *fitted*: the coefficients saw these cells; *held-out*: they saw
other cells of that model; *unfitted*: they saw nothing of that model, or of that table. Targets: 10% held-out, 20%
unfitted; rows above them are bold.
"""
_LIMIT = {"fitted": 10.0, "held-out": 10.0, "unfitted": 20.0}


def page(folder: Path) -> str:
    """Give the page (Markdown) from the public tables in `folder`."""
    from studies.roofline import energy, report

    rows = report.roofline_table(folder)
    table = folder / "ml-energy" / "llm_energy_configs.dev.csv"
    return "\n".join(
        (
            _TOP,
            "## Times, by table and model\n",
            markdown(
                ("table", "quantity", "model", "role", "n", "MAPE, %", "worst, %", "bias, %", "note"),
                (_time_row(row) for row in rows if row.by == "all"),
            ),
            "## Times, by batch, tokens and context\n",
            markdown(
                ("table", "quantity", "model", "role", "cells", "n", "MAPE, %", "worst, %"),
                (
                    (r.table, r.quantity, r.model, r.role, r.by, str(r.n), _percent(r.mape, r.role), _one(r.worst))
                    for r in rows
                    if r.by != "all"
                ),
            ),
            "## Forms that were compared\n",
            "By held-out and by unfitted error (%); the first of each part is the one in use.\n",
            markdown(
                ("part", "form", "held-out", "unfitted"),
                (
                    (c.part, c.form, _one(c.errors.held_out), _one(c.errors.unfitted))
                    for c in sorted(report.forms_table(folder), key=lambda c: (c.part, not c.chosen))
                ),
            ),
            "## Joules\n",
            markdown(
                ("quantity", "model", "role", "n", "MAPE, %", "worst, %", "note"),
                (
                    (r.quantity, r.model, r.role, str(r.n), _percent(r.mape, r.role), _one(r.worst), r.note)
                    for r in energy.energy_table(table)
                ),
            ),
        )
    )


def _time_row(row: object) -> tuple[str, ...]:
    from studies.roofline.report import Row

    assert isinstance(row, Row)
    numbers = (str(row.n), _percent(row.mape, row.role), _one(row.worst), _one(row.bias))
    return (row.table, row.quantity, row.model, row.role, *numbers, row.note)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Give a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join((*lines, *("| " + " | ".join(row) + " |" for row in rows))) + "\n"


def _percent(share: float, role: str) -> str:
    shown = _one(share)
    return f"**{shown}**" if 100 * share > _LIMIT.get(role, 10.0) else shown


def _one(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1])))
