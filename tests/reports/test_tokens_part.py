"""The part on drafted tokens: words follow the numbers, figures carry their data, and the page sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from part_page import set_part, written_from_python

from analysis.common.bootstrap import Estimate
from analysis.tokens import TokenFindings, study_tokens
from calibration.traces import bundled
from reports.page.document import Part
from reports.questions.tokens import tokens_part


@pytest.fixture(scope="module")
def findings() -> TokenFindings:
    return study_tokens(bundled("smollm2-135m-cpu-sampled"))


@pytest.fixture(scope="module")
def part(findings: TokenFindings) -> Part:
    return tokens_part(findings)


def test_the_page_sets(part: Part) -> None:
    assert set_part(part).startswith(b"%PDF")


def test_the_answer_quotes_the_findings(part: Part, findings: TokenFindings) -> None:
    assert findings.held_out is not None
    brier = findings.held_out.score("regression").brier
    assert f"{brier.value:.3f}" in part.answer.text
    assert "better than raw confidence" in part.answer.text


def test_the_answer_does_not_claim_a_gain_that_is_not_sure(findings: TokenFindings) -> None:
    assert findings.held_out is not None
    scores = tuple(
        dataclasses.replace(s, gain=Estimate(0.01, -0.01, 0.03, 72)) if s.predictor == "regression" else s
        for s in findings.held_out.scores
    )
    unsure = dataclasses.replace(findings, held_out=dataclasses.replace(findings.held_out, scores=scores))
    assert "not surely better" in tokens_part(unsure).answer.text


def test_every_figure_has_its_data_and_its_n(part: Part, findings: TokenFindings) -> None:
    assert [d.name for d in part.drawings] == ["token-odds", "token-calibration", "token-hazard"]
    for drawing in part.drawings:
        assert "72 requests, 6 domains]" in drawing.caption
        assert len({tuple(record) for record in drawing.data}) == 1
    hazard = part.drawings[2].data
    assert len(hazard) == sum(len(curve.points) for curve in findings.hazards)
    point = findings.hazards[0].points[0]
    assert (hazard[0]["hazard"], hazard[0]["at_risk"]) == (point.hazard.value, point.at_risk)


def test_a_fit_that_was_left_out_leaves_a_gap_and_a_word(findings: TokenFindings) -> None:
    assert findings.regression is not None
    ratios = tuple(dataclasses.replace(r, exchangeable=None) for r in findings.regression.ratios)
    regression = dataclasses.replace(
        findings.regression,
        ratios=ratios,
        correlation=None,
        troubles=("the exchangeable equations did not converge",),
    )
    part = tokens_part(dataclasses.replace(findings, regression=regression))
    fits = {record["fit"] for record in part.drawings[0].data}
    assert fits == {"independence", "mixed"}
    assert any("The exchangeable equations did not converge." in getattr(b, "text", "") for b in part.blocks)
    assert np.isfinite(float(part.drawings[0].data[0]["odds_ratio"]))


def test_the_hazard_alone_is_a_part(findings: TokenFindings) -> None:
    part = tokens_part(dataclasses.replace(findings, regression=None, held_out=None, notes=("nothing was felt",)))
    assert [d.name for d in part.drawings] == ["token-hazard"]
    assert "The hazard of rejection by depth of prompt-lookup is falling" in part.answer.text
    assert "nothing was felt" in part.limits[0].text
    assert set_part(part).startswith(b"%PDF")


def test_write_report_takes_these_findings(findings: TokenFindings, part: Part, tmp_path: Path) -> None:
    assert part.title in written_from_python(findings, tmp_path)
