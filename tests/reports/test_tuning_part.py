"""The part on tuning: a page that typst accepts, figures with data and labels, words that follow the numbers."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from part_page import set_part, written_from_python
from scenarios import DRAFT, LINEAR, random_runs
from several import several

from analysis.tuning import TuneFindings, TuneSettings, tune
from analysis.tuning.export import export
from calibration.traces import DrafterInfo
from reports.page.document import Bullets, Paragraph, Part, Table
from reports.page.text import named
from reports.questions.tuning import tuning_part
from reports.questions.tuning_figures import figure_files
from simulator.scenario.loading import parse_scenario

HOSTILE = '#panic("x") $a_1$ *b* <label> @ref \\ {d} & <svg/> % "q" \u8349'


@pytest.fixture(scope="module")
def findings() -> TuneFindings:
    rng = np.random.default_rng(3)
    runs = {name: [random_runs(rng, 24, alpha=a) for _ in range(12)] for name, a in (("lookup", 0.8), ("exit", 0.4))}
    given = parse_scenario(
        {
            "name": "chat",
            "workload": {"kind": "closed", "concurrency": 2, "requests": 6},
            "costs": {"verifier": LINEAR, "drafter": DRAFT},
            "slo": {"e2el_ms": 1e9},
        }
    )
    found = tune(given, TuneSettings(replications=3, workers=1, draft_tokens=(1, 4)), traces=several(runs))
    drafters = [
        DrafterInfo(name="lookup", paradigm="ngram", deterministic=True),
        DrafterInfo(name="exit", paradigm="early-exit", deterministic=False),
    ]
    exports = tuple(export(found, engine, drafters, {}, 256) for engine in ("vllm", "sglang", "tensorrt-llm"))
    return dataclasses.replace(found, exports=exports)


@pytest.fixture(scope="module")
def part(findings: TuneFindings) -> Part:
    return tuning_part(findings)


def test_the_page_is_accessible_and_the_same_twice(findings: TuneFindings, part: Part) -> None:
    assert set_part(part) == set_part(tuning_part(findings))


def test_figures_are_vectors_with_data_labels_and_their_n(part: Part) -> None:
    names = [drawing.name for drawing in part.drawings]
    assert names == ["tuning-contenders", "tuning-sensitivity", "tuning-batches"]
    for drawing in part.drawings:
        ElementTree.fromstring(drawing.svg)
        assert "<image" not in drawing.svg
        assert re.search(r"\[simulated; .*\d+ recorded requests\]$", drawing.caption)
        assert len(drawing.alt) > 60
        assert drawing.data
        assert len({tuple(row) for row in drawing.data}) == 1
    assert "no intervals" in part.drawings[2].caption


def test_the_answer_says_the_number_its_interval_and_what_comes_as_close(findings: TuneFindings, part: Part) -> None:
    text = part.answer.text
    assert f"\u2018{findings.best.name}\u2019 reaches" in text
    assert f"{findings.judged.best.value:.1f} ({findings.judged.best.low:.1f}" in text
    assert findings.judged.how in text
    if findings.runners_up:
        assert f"\u2018{named(findings.runners_up[0].name)}\u2019" in text
    alone = dataclasses.replace(findings, runners_up=(), feasible=False)
    text = tuning_part(alone).answer.text
    assert "Not to be told apart" not in text
    assert "No setting keeps the service-level objectives" in text


def test_the_tables_hold_best_runners_up_baseline_and_oracles(findings: TuneFindings, part: Part) -> None:
    ranking, gaps = (block for block in part.blocks if isinstance(block, Table))
    assert ranking.rows[0][0] == "best"
    assert len(ranking.rows) >= 2
    assert ranking.header[-1] == "Within SLO"
    assert len(gaps.rows) == len(findings.oracles)
    exports = next(block for block in part.blocks if isinstance(block, Bullets))
    assert {item.lead for item in exports.items} == {"vllm:", "sglang:", "tensorrt-llm:"}


def test_cuts_notes_and_the_winners_curse_are_limits(findings: TuneFindings) -> None:
    cut = dataclasses.replace(findings.plan, cuts=("final stage: 3 of 16 replications",), chosen_by="clock")
    part = tuning_part(dataclasses.replace(findings, plan=cut, notes=("something odd",)))
    words = " ".join(block.text for block in part.blocks if isinstance(block, Paragraph))
    assert "final stage: 3 of 16 replications" in words
    limits = " ".join(paragraph.text for paragraph in part.limits)
    assert "Something odd." in limits
    assert "as they chose it" in limits
    assert "timing on the machine" in limits


def test_names_are_shown_never_interpreted(findings: TuneFindings) -> None:
    best = dataclasses.replace(findings.best, name=HOSTILE)
    others = tuple(one for one in findings.candidates if one.status != "best")
    odd = dataclasses.replace(findings, best=best, candidates=(best, *others), scenario=HOSTILE)
    assert set_part(tuning_part(odd))


def test_figures_come_as_files_with_their_data(findings: TuneFindings) -> None:
    files = figure_files(findings)
    assert set(files) == {
        f"tuning-{name}.{kind}" for name in ("contenders", "sensitivity", "batches") for kind in ("svg", "csv")
    }
    rows = files["tuning-sensitivity.csv"].splitlines()
    assert rows[0] == "dimension,series,at,relative_to_best,low,high,best"
    assert len(rows) > 4


def test_write_report_takes_these_findings(findings: TuneFindings, part: Part, tmp_path: Path) -> None:
    assert part.title in written_from_python(findings, tmp_path)
