"""The part on drafter size: a page that typst accepts, figures with data, and words that follow the numbers."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from part_page import set_part, written_from_python
from sized import sized_traces

from analysis.size import SizeFindings, SizeSettings, main_curve, study_size
from analysis.size.facts import Facts, MeasuredSpeedup
from calibration.traces import bundled
from reports.page.document import Paragraph, Part, Table
from reports.questions.size import size_part


@pytest.fixture(scope="module")
def findings() -> SizeFindings:
    return study_size(bundled("smollm2-135m-cpu-distilled"), SizeSettings(draws=300))


@pytest.fixture(scope="module")
def part(findings: SizeFindings) -> Part:
    return size_part(findings)


def test_it_sets_without_a_warning_and_the_same_again(part: Part, findings: SizeFindings) -> None:
    pdf = set_part(part)
    assert pdf.startswith(b"%PDF")
    assert size_part(findings) == part


def test_a_family_of_another_kind_sets_too() -> None:
    """Few sizes, no catalogued device, one batch size: the blocks that are left still make a page."""
    traces = sized_traces(np.random.default_rng(0), (0.5, 0.7, 0.8), (0.001, 0.002, 0.004), sequences=6, tokens=60)
    settings = SizeSettings(batches=(1,), catalogue=(), large_batches=(4,), draws=100)
    found = study_size(traces, settings)
    part = size_part(found)
    assert set_part(part).startswith(b"%PDF")
    assert main_curve(found.measured).spot.pays
    assert "no drafter of this family pays" not in part.guidelines[0].text


def test_every_figure_has_data_a_label_and_an_alternative(part: Part) -> None:
    assert [d.name for d in part.drawings] == ["size-curves", "size-step-costs", "size-curves-large", "size-optima"]
    for drawing in part.drawings:
        assert drawing.data
        assert len({tuple(row) for row in drawing.data}) == 1
        assert re.search(r"\[[^\]]*(simulated|fitted|extrapolated)[^\]]*n = \d+[^\]]*\]$", drawing.caption)
        assert len(drawing.alt) > 60
        ElementTree.fromstring(drawing.svg)
        assert "<image" not in drawing.svg


def test_every_table_says_how_its_numbers_were_come_by(part: Part) -> None:
    tables = [b for b in part.blocks if isinstance(b, Table)]
    assert len(tables) == 9
    for table in tables:
        assert re.search(r"\[(simulated|extrapolated|published)[^\]]*\]$", table.caption), table.caption


def test_the_data_of_the_curve_are_those_of_the_findings(part: Part, findings: SizeFindings) -> None:
    rows = [r for r in part.drawings[0].data if r["latency"] == "recorded step times" and r["batch"] == 1]
    points = main_curve(findings.measured).points
    assert [r["speedup"] for r in rows] == [p.speedup.value for p in points]
    assert [r["low"] for r in rows] == [p.speedup.low for p in points]


def test_the_answer_gives_the_number_its_interval_and_that_it_does_not_pay(
    part: Part, findings: SizeFindings
) -> None:
    assert re.search(r"best drafter has \d+% \(\S+% to \S+%\)", part.answer.text)
    assert "no size pays there" in part.answer.text
    assert "extrapolated" in part.answer.text
    miss = findings.extrapolated.discrepancy.largest
    assert miss is not None
    assert f"largest miss: {miss.published:.2f} measured against" in part.answer.text
    assert "Apertus v1.5 70B with its 8B" in part.answer.text
    assert "100%" not in part.answer.text
    assert "no drafter of this family pays" in part.guidelines[0].text
    assert any("quoted" in limit.text for limit in part.limits)


def test_another_largest_miss_is_told_on_the_front_page_as_well() -> None:
    """Constructed facts: the page names what was missed by most, whichever check that is."""
    checks = [
        MeasuredSpeedup(
            "engine A: batch 1", "llama-3.1-70b", "llama-3.2-1b", "h200", 1, "bf16", 9.5, 2, 2.2, "quoted"
        ),
        MeasuredSpeedup("engine B: batch 1", "llama-3.1-70b", "llama-3.1-8b", "h200", 1, "bf16", 1.8, 2, 2.4, "file"),
    ]
    traces = sized_traces(np.random.default_rng(0), (0.5, 0.7, 0.8), (0.001, 0.002, 0.004), sequences=6, tokens=60)
    settings = SizeSettings(batches=(1,), catalogue=(), large_batches=(1,), draws=100, published=("qwen2.5-0.5b",))
    found = study_size(traces, settings, Facts(speedups=tuple(checks)))
    part = size_part(found)
    assert "largest miss: 9.50 measured against" in part.answer.text
    assert "(engine A, quoted)" in part.answer.text
    assert "No published shape has its vocabulary" in part.answer.text
    assert any("qwen2.5-0.5b: it has the vocabulary of qwen2.5" in limit.text for limit in part.limits)
    assert set_part(part).startswith(b"%PDF")
    unchecked = size_part(study_size(traces, settings, Facts(speedups=())))
    assert "the error of engines is not in the interval" in unchecked.answer.text
    assert set_part(unchecked).startswith(b"%PDF")


def test_words_about_published_optima_follow_the_interval(findings: SizeFindings) -> None:
    large = findings.extrapolated
    first = large.assumptions[0]
    narrow = dataclasses.replace(first.best, low=first.best.value, high=first.best.value)
    views = (dataclasses.replace(first, best=narrow), *large.assumptions[1:])
    changed = dataclasses.replace(findings, extrapolated=dataclasses.replace(large, assumptions=views))

    def said(found: SizeFindings) -> str:
        texts = [b for b in size_part(found).blocks if isinstance(b, Paragraph)]
        return next(b.text for b in texts if b.lead == "What the optimum hangs on")

    assert "1/200 (SDSL" in said(findings)
    assert "no published optimum" in said(changed)


def test_write_report_takes_these_findings(findings: SizeFindings, part: Part, tmp_path: Path) -> None:
    assert part.title in written_from_python(findings, tmp_path)
