"""The document of a validation and the Markdown table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fidelity_made import made_fidelity
from pypdf import PdfReader

from analysis.fidelity.table import Compared, Crossover, errors_of, missed
from calibration.common.errors import ReportError
from reports.writing.validation import fidelity_markdown, write_validation


def test_errors_are_relative_to_the_measurement() -> None:
    assert Compared("output_throughput", 50.0, 55.0).error == pytest.approx(0.1)
    errors = errors_of("output_throughput", made_fidelity().held_out("engine-a"))
    assert errors is not None
    assert (errors.conditions, errors.median, errors.worst) == (6, pytest.approx(0.03), pytest.approx(0.04))
    assert errors.bias == pytest.approx(0.03)
    assert errors.worst_condition.startswith("engine-a: lookup-4-batch-")
    assert errors_of("speedup", made_fidelity().held_out("engine-a")) is None


def test_targets_judge_driven_engines_only() -> None:
    found = {(source, name, statistic) for source, name, statistic, _, _ in missed(made_fidelity())}
    assert ("engine-b", "output_throughput", "worst") in found
    assert not any(source == "table" for source, _, _ in found)


def test_grid_steps_between_crossovers() -> None:
    def crossing(measured: int | None, predicted: int | None) -> Crossover:
        return Crossover("s", "d", "4", (1, 2, 4, 8), measured, predicted, (1.0,) * 4, (1.0,) * 4)

    assert crossing(2, 4).steps_apart == 1
    assert crossing(None, 8).steps_apart == 1
    assert crossing(None, None).steps_apart == 0
    assert crossing(1, None).steps_apart == 4


def test_the_document_holds_every_condition_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    path = write_validation(made_fidelity(), tmp_path / "report.pdf")
    again = write_validation(made_fidelity(), tmp_path / "again" / "report.pdf")
    assert path.read_bytes() == again.read_bytes()
    pages = "".join(page.extract_text() for page in PdfReader(path).pages)
    text = "".join(pages.replace("\u200b", "").replace("\xad", "-").split())
    for word in ("lookup-4-batch-8", "Prefill is mixed in.", "A paper (2025)", "held-out", "pays at all", "Missed:"):
        assert word.replace(" ", "") in text, word
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    figures = ("fidelity-predicted-measured", "fidelity-errors", "fidelity-crossovers")
    assert names == {f"{name}.{ending}" for name in figures for ending in ("svg", "csv")}
    rows = (tmp_path / "figures" / "fidelity-errors.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + len(made_fidelity().held_out())


def test_a_validation_of_nothing_is_refused(tmp_path: Path) -> None:
    empty = replace(made_fidelity(), conditions=())
    with pytest.raises(ReportError, match="conditions"):
        write_validation(empty, tmp_path / "report.pdf")
    assert not (tmp_path / "report.pdf").exists()


def test_the_markdown_table_has_a_row_for_each_source() -> None:
    lines = fidelity_markdown(made_fidelity()).splitlines()
    assert len(lines) == 2 + 3
    assert "| 3.0 / 4.0% |" in lines[2]
    assert "6 (2 open-loop)" in lines[2]
    assert "1 of 2 within a grid step" in lines[2]
