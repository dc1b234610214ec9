"""The page on the roofline is what the public tables give."""

from __future__ import annotations

from pathlib import Path

from shared_data import shared_data

from studies.pages.roofline import page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_fresh() -> None:
    """`python -m studies.pages.roofline FOLDER > docs/roofline.md` writes it again."""
    data = shared_data("ml-energy", "llm_energy_configs.dev.csv").parents[1]
    assert page(data) == (DOCS / "roofline.md").read_text(encoding="utf-8")


def test_rows_above_their_target_are_bold() -> None:
    """Whoever reads the page sees what misses its target: recomputed from the numbers on the page."""
    lines = [
        line for line in (DOCS / "roofline.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    times = [line.strip("| ").split(" | ") for line in lines]
    rows = [
        row for row in times if len(row) >= 8 and row[3] in ("fitted", "held-out", "unfitted") and row[4].isdigit()
    ]
    assert len(rows) > 30
    for row in rows:
        limit = 20.0 if row[3] == "unfitted" else 10.0
        shown = float(row[5].strip("*"))
        assert row[5].startswith("**") == (shown > limit) or shown == limit, row
