"""The part on cascades: a page that typst accepts, figures with data, and words that follow the numbers."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from cascade_made import graded_by_difficulty
from part_page import set_part, written_from_python

from analysis.cascade import CascadeFindings, study_cascade
from analysis.cascade.findings import BestAt
from analysis.common.bootstrap import Estimate
from reports.page.document import Bullets, Paragraph, Part, Table
from reports.questions.cascade import cascade_part

LAMBDAS = (1.5, 4.0, 10.0, 25.0, 60.0)


@pytest.fixture(scope="module")
def both() -> tuple[CascadeFindings, CascadeFindings]:
    table = graded_by_difficulty(np.random.default_rng(3), 160, (1.0, 8.0))
    continued = study_cascade(dataclasses.replace(table, continued=True), LAMBDAS, draws=100)
    return study_cascade(table, LAMBDAS, draws=100), continued


@pytest.fixture(scope="module")
def part(both: tuple[CascadeFindings, CascadeFindings]) -> Part:
    return cascade_part(*both)


def words(part: Part) -> str:
    texts = [part.answer.text, *(p.text for p in (*part.guidelines, *part.limits))]
    for block in part.blocks:
        texts += [block.text] if isinstance(block, Paragraph) else []
        texts += [p.text for p in block.items] if isinstance(block, Bullets) else []
    return " ".join(texts)


def test_it_sets_without_a_warning_and_the_same_again(
    part: Part, both: tuple[CascadeFindings, CascadeFindings]
) -> None:
    assert set_part(part).startswith(b"%PDF")
    assert cascade_part(*both) == part


def test_figures_are_vectors_with_data_and_their_sample(part: Part, both: tuple[CascadeFindings, object]) -> None:
    found = both[0]
    assert [d.name for d in part.drawings] == ["cascade-frontier", "cascade-usage", "cascade-reliability"]
    for drawing in part.drawings:
        root = ElementTree.fromstring(drawing.svg)
        assert not list(root.iter("{http://www.w3.org/2000/svg}image"))
        assert re.search(r"\[made up; n = 160 items, 2 domains\]$", drawing.caption)
        assert len({tuple(row) for row in drawing.data}) == 1
    frontier, usage, reliability = part.drawings
    assert len(frontier.data) == len(found.stages) + len(found.policies) * len(LAMBDAS)
    shares = [row["answered"] for row in usage.data if row["policy"] == "sequential" and row["lambda"] == 25.0]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert {row["stage"] for row in reliability.data} == {"stage-0", "stage-1"}


def test_the_answer_gives_the_gain_with_its_interval(part: Part, both: tuple[CascadeFindings, object]) -> None:
    head = both[0].headline
    together = head.mean_gain_together
    assert together.low is not None
    assert together.low < head.mean_gain.low
    low = f"{100 * together.low:+.1f}".replace("-", "\u2212")
    assert f"{100 * abs(head.mean_gain.value):.1f} ({low} to" in part.answer.text
    assert "bounds that hold for all policies at once" in part.answer.text
    assert "160 items" in part.answer.text


def test_a_gain_that_may_be_none_is_told_as_such(both: tuple[CascadeFindings, object]) -> None:
    found = both[0]
    unsure = Estimate(0.004, -0.003, 0.011, 160)
    sure = Estimate(0.02, 0.01, 0.03, 160)
    head = dataclasses.replace(found.headline, mean_gain=sure, mean_gain_together=unsure, pays=False)
    curves = tuple(dataclasses.replace(c, mean_gain=sure, mean_gain_together=unsure) for c in found.policies)
    said = cascade_part(dataclasses.replace(found, headline=head, policies=curves))
    assert "No learned policy is shown to be better" in said.answer.text
    assert "+0.4 (\u22120.3 to +1.1)" in said.answer.text
    assert "Serve one stage here" in words(said)
    curves = tuple(dataclasses.replace(curve, mean_gain_together=sure) for curve in found.policies)
    head = dataclasses.replace(found.headline, mean_gain_together=sure, pays=True)
    said = cascade_part(dataclasses.replace(found, headline=head, policies=curves))
    assert "gains +2.0 (+1.0 to +3.0) points of quality" in said.answer.text
    assert "Use sequential or cascade-routing or route once here" in words(said)


def test_what_may_be_as_good_where_it_gains_most_is_named(both: tuple[CascadeFindings, object]) -> None:
    found = both[0]
    head = dataclasses.replace(found.headline, policy="sequential", pays=True)

    def said(policies: tuple[str, ...], stages: tuple[str, ...]) -> str:
        best = tuple(BestAt(lam, policies, stages) for lam in LAMBDAS)
        return cascade_part(dataclasses.replace(found, headline=head, best=best)).answer.text

    assert "There route once and stage-1 cannot be told" in said(("sequential", "route-once"), ("stage-1",))
    assert "Nothing else that can be run is as good there" in said(("sequential",), ())


def test_both_facts_about_the_published_cascade_are_told(part: Part) -> None:
    text = words(part)
    assert "70B was chosen in all of 60 runs. [published; github.com/sa2shun" in text
    assert "70B costs 7.2 more than 13B (routed) or 13 more once 13B ran" in text
    assert "13B from 0, 34B from 26 and 70B from 46" in text
    assert "better by more than 0.52 (routed) or 0.84 (sequential)" in text
    assert "99.4% at 5" in text


def test_tables_tell_where_each_stage_is_used(part: Part, both: tuple[CascadeFindings, object]) -> None:
    tables = [block for block in part.blocks if isinstance(block, Table)]
    ranges = next(t for t in tables if t.header[0] == "Stage" and "sequential" in t.header)
    assert [row[0] for row in ranges.rows] == ["stage-0", "stage-1"]
    assert re.match(r"(at all|up to [\d.]+) \(100%\)", ranges.rows[0][1])
    last = next(r for r in both[0].ranges if r.policy == "sequential" and r.stage == "stage-1")
    assert ranges.rows[1][1].startswith(f"from {last.from_lambda:.3g}")
    scores = next(t for t in tables if "AUROC" in t.header)
    assert [row[1] for row in scores.rows] == ["before any", "1 of 2", "before any", "1 of 2", "2 of 2"]


def test_the_other_way_to_count_costs_is_told_beside(part: Part) -> None:
    assert "The same answers where stages go on from each other: gains" in words(part)


def test_write_report_takes_these_findings(
    both: tuple[CascadeFindings, CascadeFindings], part: Part, tmp_path: Path
) -> None:
    assert part.title in written_from_python(both[0], tmp_path)
