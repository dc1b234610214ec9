"""The knowledge question in a report: what it says, what it shows, and that it can be set."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from part_page import set_part, written_from_python
from request_tables import HOMES, ROUNDS_ONLY, specialised

from analysis.common.bootstrap import Estimate
from analysis.knowledge import KnowledgeFindings, study_knowledge
from analysis.knowledge.findings import PublishedRow
from reports.page.document import Part
from reports.questions.knowledge import knowledge_part


@pytest.fixture(scope="module")
def findings() -> KnowledgeFindings:
    found = study_knowledge(
        specialised(),
        generalist="both",
        specialists=HOMES,
        draft_tokens=3,
        lengths=(3,),
        prices=[ROUNDS_ONLY],
        accuracies=(0.3, 0.6, 1.0),
        draws=200,
    )
    return dataclasses.replace(found, published=(PublishedRow("a table", "a setting", 0.5, 0.6, None),))


@pytest.fixture(scope="module")
def part(findings: KnowledgeFindings) -> Part:
    return knowledge_part(findings)


def test_the_answer_has_the_numbers_and_their_intervals(part: Part, findings: KnowledgeFindings) -> None:
    assert part.answer.lead == "Generalist or specialists"
    assert "specialists on their home domains beat a generalist of the same cost" in part.answer.text
    assert f"{findings.pooled.difference.value:.2f} (" in part.answer.text
    assert f"{findings.routers[0].break_even.value:.2f} (" in part.answer.text
    assert "12 prompts" in part.answer.text


def test_a_router_that_cannot_pay_is_said_not_to(findings: KnowledgeFindings) -> None:
    router = dataclasses.replace(findings.routers[0], break_even=Estimate(1.4, 1.1, 1.9, 12))
    told = knowledge_part(dataclasses.replace(findings, routers=(router,)))
    assert "No router accuracy makes the specialists pay" in told.answer.text
    assert told.guidelines[0].lead == "One generalist."


def test_what_is_said_of_specialists_away_from_home_follows_the_verdicts(findings: KnowledgeFindings) -> None:
    told = " ".join(p.text for p in knowledge_part(findings).guidelines)
    assert "away from home no specialist is shown to be better" in told
    away = next(r for r in findings.paired if not r.home)
    rows = tuple(dataclasses.replace(r, verdict="better") if r is away else r for r in findings.paired)
    told = " ".join(p.text for p in knowledge_part(dataclasses.replace(findings, paired=rows)).guidelines)
    assert f"but for {away.specialist} on {away.domain}, which was better there" in told


def test_the_farthest_transfer_has_bounds_for_all_pairs(findings: KnowledgeFindings) -> None:
    for cell in findings.transfer:
        if None not in (cell.together.low, cell.relative.low) and cell.relative.low != cell.relative.high:
            assert cell.together.low <= cell.relative.low
    assert any("bounds for all pairs at once" in getattr(b, "text", "") for b in knowledge_part(findings).blocks)


def test_figures_carry_their_data_sample_and_label(part: Part, findings: KnowledgeFindings) -> None:
    assert [drawing.name for drawing in part.drawings] == [
        "knowledge-paired",
        "knowledge-transfer",
        "knowledge-router",
    ]
    for drawing in part.drawings:
        assert re.search(r"\[(measured|simulated)[^\]]*n = 12 requests, 2 domains\]$", drawing.caption)
        assert drawing.data
        assert len({tuple(record) for record in drawing.data}) == 1
    assert len(part.drawings[0].data) == len(findings.paired)
    chosen = {record["choice"] for record in part.drawings[2].data}
    assert chosen >= {"generalist", "label", "oracle by request", "oracle by round", "misses anywhere"}


def test_it_can_be_set(part: Part) -> None:
    assert set_part(part).startswith(b"%PDF")


def test_write_report_takes_these_findings(findings: KnowledgeFindings, part: Part, tmp_path: Path) -> None:
    assert part.title in written_from_python(findings, tmp_path)
