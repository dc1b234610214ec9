"""The part on laws: the answer follows the numbers, too few levels are said, and the page sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from part_page import set_part, written_from_python

from analysis.laws import LawFindings, find_laws
from calibration.common.errors import ReportError
from calibration.traces import bundled, bundled_path
from reports.page.document import Part
from reports.questions.laws import laws_part

FAMILY = "smollm2-135m-cpu-distilled"


@pytest.fixture(scope="module")
def findings() -> LawFindings:
    return find_laws(family=bundled(FAMILY), curves=bundled_path(FAMILY) / "recipe" / "curves.csv")


@pytest.fixture(scope="module")
def part(findings: LawFindings) -> Part:
    return laws_part(findings)


def test_the_page_sets(part: Part) -> None:
    assert set_part(part).startswith(b"%PDF")


def test_the_answer_is_the_slope_of_a_doubling(part: Part, findings: LawFindings) -> None:
    fitted = findings.law("size").drawn.fit("log-linear")
    assert fitted is not None
    at = 4e6
    gain = float(fitted.predict(2 * at) - fitted.predict(at))
    assert f"Twice the drafter accepts {gain:.2g} (" in part.answer.text
    assert "bonus not included" in part.answer.text


def test_figures_carry_points_residuals_and_errors(part: Part, findings: LawFindings) -> None:
    assert [d.name for d in part.drawings] == ["law-size", "law-training-tokens"]
    for drawing in part.drawings:
        assert len({tuple(record) for record in drawing.data}) == 1
        assert {"point", "residual", "interpolation error", "extrapolation error"} == {
            r["what"] for r in drawing.data
        }
    assert "n = 72 requests" in part.drawings[0].caption
    points = [r for r in part.drawings[0].data if r["what"] == "point" and r["of"] == "all domains"]
    assert [p["y"] for p in points] == [p.y.value for p in findings.law("size").drawn.points]


def test_what_was_not_asked_is_said(part: Part) -> None:
    said = [p.text for p in part.limits if p.lead == "Absent law."]
    assert len(said) == 4
    assert all("no data were given" in text for text in said)


def test_extrapolation_is_labelled(part: Part) -> None:
    assert any("[extrapolated]" in p.text for p in part.guidelines)


def test_one_law_without_the_size_law_still_answers(findings: LawFindings) -> None:
    alone = dataclasses.replace(findings, laws=(findings.law("training-tokens"),))
    assert "training tokens" in laws_part(alone).answer.text
    none = dataclasses.replace(findings, laws=())
    with pytest.raises(ReportError, match="needs one law at least"):
        laws_part(none)


def test_write_report_takes_these_findings(findings: LawFindings, part: Part, tmp_path: Path) -> None:
    assert part.title in written_from_python(findings, tmp_path)
