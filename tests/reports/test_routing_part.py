"""Routing in a report: what it says, what it shows, and that it can be set."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from part_page import set_part, written_from_python
from request_tables import PRICES, two_kinds

from analysis.common.bootstrap import Estimate
from analysis.routing.findings import RoutingFindings
from analysis.routing.study import RoutingSettings, study_routing
from reports.page.document import Part, Table
from reports.questions.routing import best_router, routing_part


@pytest.fixture(scope="module")
def findings() -> RoutingFindings:
    settings = RoutingSettings(
        lengths=(4,), batches=(4,), orders=3, growth_requests=48, drift_requests=50, online_lengths=(2, 4), draws=200
    )
    return study_routing(two_kinds(24), prices=[PRICES], settings=settings)


@pytest.fixture(scope="module")
def part(findings: RoutingFindings) -> Part:
    return routing_part(findings)


def test_the_answer_names_router_single_drafter_and_interval(part: Part, findings: RoutingFindings) -> None:
    row = best_router(findings.prices[0])
    assert row.policy in ("domain label", "calibrated classifier", "naive Bayes classifier", "merged drafts")
    assert f"beats the best single drafter, {row.best_single}: +" in part.answer.text
    assert re.search(r"\+\d+\.\d \(\+\d+\.\d to \+\d+\.\d\)%", part.answer.text)
    assert part.guidelines[0].lead == "Route small batches."


def test_where_no_router_wins_it_says_so(findings: RoutingFindings) -> None:
    same = Estimate(1.0, 1.0, 1.0, 24)
    rows = tuple(
        dataclasses.replace(row, against_single=same, against_together=same, verdict="cannot tell apart")
        for row in findings.prices[0].rows
    )
    told = routing_part(dataclasses.replace(findings, prices=(dataclasses.replace(findings.prices[0], rows=rows),)))
    assert "always takes the best single drafter" in told.answer.text
    assert told.guidelines[0].lead == "One drafter."
    assert any(
        "no way to choose is shown to beat it on any traffic" in getattr(block, "text", "") for block in told.blocks
    )


def test_the_answer_says_how_many_may_be_as_good_and_what_bounds_hold_for(findings: RoutingFindings) -> None:
    (routing,) = findings.prices
    row = best_router(routing)
    fair = [r.policy for r in routing.rows if r.domain is None and not r.oracle]
    told = routing_part(dataclasses.replace(findings, prices=(dataclasses.replace(routing, alike=tuple(fair)),)))
    assert f"{len(fair) - 1} of {len(fair) - 1} others, single drafters included, may be as good" in told.answer.text
    assert "Bounds hold for all ways to choose and all drafters at once" in told.answer.text
    alone = dataclasses.replace(routing, alike=(row.policy,))
    assert "may be as good" not in routing_part(dataclasses.replace(findings, prices=(alone,))).answer.text


def test_speculation_is_said_not_to_pay_only_where_that_is_shown_for_all(findings: RoutingFindings) -> None:
    (routing,) = findings.prices

    def told(high: float, best: float) -> str:
        below = Estimate(0.9, 0.8, high, 24)
        rows = tuple(
            dataclasses.replace(r, speedup_together=dataclasses.replace(below, high=best))
            if r.policy == "always a"
            else dataclasses.replace(r, speedup_together=below)
            for r in routing.rows
        )
        return routing_part(
            dataclasses.replace(findings, prices=(dataclasses.replace(routing, rows=rows),))
        ).answer.text

    assert "Speculation itself does not pay there" in told(0.95, 0.97)
    assert "Speculation itself does not pay there" not in told(0.95, 1.02)


def test_figures_carry_their_data_sample_and_label(part: Part) -> None:
    names = [drawing.name for drawing in part.drawings]
    assert names == ["routing-regret", "routing-reliability", "routing-growth", "routing-drift"]
    for drawing in part.drawings:
        assert re.search(r"\[(measured|simulated)[^\]]*n = 24 requests, 2 domains\]$", drawing.caption)
        assert drawing.data
        assert len({tuple(record) for record in drawing.data}) == 1


def test_tables_hold_traffic_batches_and_online_lengths(part: Part) -> None:
    tables = [block for block in part.blocks if isinstance(block, Table)]
    assert [row[1] for row in tables[0].rows] == ["mixed", "chat", "code"]
    assert {row[2] for row in tables[1].rows} >= {"always a", "calibrated classifier", "oracle by round"}
    assert "moving_average" in {row[2] for row in tables[2].rows}


def test_without_a_classifier_the_rest_is_told(findings: RoutingFindings) -> None:
    told = routing_part(dataclasses.replace(findings, classifier=None, without_classifier="prompts were not kept"))
    assert "routing-reliability" not in {drawing.name for drawing in told.drawings}
    assert any(
        "There is no classifier: prompts were not kept." in getattr(block, "text", "") for block in told.blocks
    )


def test_it_can_be_set(part: Part) -> None:
    assert set_part(part).startswith(b"%PDF")


def test_write_report_takes_these_findings(findings: RoutingFindings, part: Part, tmp_path: Path) -> None:
    assert part.title in written_from_python(findings, tmp_path)
