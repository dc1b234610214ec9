"""The three templates: what comes first, what is left out, and that nothing is silent."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from capacity_made import made_capacity
from drawn import clustered
from fidelity_made import made_fidelity
from pypdf import PdfReader

import reports.writing.collect
from analysis import Findings, StudySettings, study
from analysis.capacity import CapacityFindings
from analysis.common.records import from_json
from calibration.common.errors import ReportError
from reports.page.document import Paragraph
from reports.page.inputs import Inputs
from reports.questions.capacity import capacity_part
from reports.questions.fidelity import fidelity_part
from reports.writing.collect import Answered, Answers, Options, TraceQuestion, Unanswered, collect
from reports.writing.report import Place, pages, write_answers

NAMES = ("a-set", "a-validation")


@pytest.fixture(scope="module")
def findings() -> Findings:
    settings = StudySettings(draft_tokens=(1, 2, 4), batches=(1, 2), draws=200)
    return study(clustered(np.random.default_rng(1), sequences=12, tokens=40), settings=settings, workers=1)


@pytest.fixture(scope="module")
def answers(findings: Findings) -> Answers:
    plan, checked = made_capacity(), made_fidelity()
    return Answers(
        "2026-01-03T00:00:00+00:00",
        findings,
        (Answered("fidelity", fidelity_part(checked), checked), Answered("capacity", capacity_part(plan), plan)),
        (Unanswered("Drafter size", "there is one size only"),),
    )


@pytest.fixture
def written(answers: Answers, tmp_path: Path) -> Callable[[str], PdfReader]:
    return lambda template: PdfReader(
        write_answers(answers, NAMES, answers.created, tmp_path / f"{template}.pdf", template)
    )


def bare(text: str) -> str:
    return re.sub(r"[\s\u200b\xad-]", "", text)


def text_of(pdf: PdfReader) -> str:
    return bare("".join(page.extract_text() for page in pdf.pages))


def test_the_study_has_the_answers_on_its_front_and_the_parts_in_order(written: Callable[[str], PdfReader]) -> None:
    pdf = written("study")
    first, text = bare(pdf.pages[0].extract_text()), text_of(pdf)
    for words in (
        "lookup pays at",
        "Trust. Throughput under speculation",
        "Capacity. Within 99% of requests",
    ):
        assert bare(words) in first
    places = [
        text.index(bare(title))
        for title in (
            "1 Which drafter pays, and up to where",
            "2 Where the numbers come from",
            "7 Predicted against measured",
            "8 Capacity plan",
            "9 Guidelines in plain words",
            "10 Not answered here",
            "Drafter size. Because there is one size only.",
            "11 Methods and limits of validity",
        )
    ]
    assert places == sorted(places)


def test_the_capacity_plan_comes_first_in_its_template(written: Callable[[str], PdfReader]) -> None:
    pdf = written("capacity")
    first = bare(pdf.pages[0].extract_text())
    assert bare("How much load does it carry?") in first
    assert bare("Answer. Within 99% of requests") in first
    assert text_of(pdf).index(bare("1 Capacity plan")) < text_of(pdf).index(bare("2 Predicted against measured"))


def test_the_brief_has_two_pages_with_answers_advice_and_limits(written: Callable[[str], PdfReader]) -> None:
    pdf = written("brief")
    assert len(pdf.pages) == 2
    text = text_of(pdf)
    for words in (
        "lookup pays at",
        "Capacity. Within",
        "Guidelines",
        "Limits",
        "Drafter size; the study says",
    ):
        assert bare(words) in text
    assert text.count("Figure") == 1


def test_a_brief_of_many_answers_still_has_two_pages_and_says_what_it_left_out(
    answers: Answers, tmp_path: Path
) -> None:
    advice = tuple(Paragraph("Do this, and then do that, and look again at what came of it. " * 3) for _ in range(9))
    part = dataclasses.replace(answers.answered[1].part, guidelines=advice, limits=advice, drawings=())
    many = (*answers.answered, *(Answered(f"more-{i}", part, None) for i in range(4)))
    full = dataclasses.replace(answers, answered=many)
    path = write_answers(full, NAMES, full.created, tmp_path / "brief.pdf", "brief")
    pdf = PdfReader(path)
    assert len(pdf.pages) == pages(path.read_bytes()) == 2
    assert text_of(pdf).count(bare("more in the study.")) == 2


def test_a_pdf_path_has_its_figures_beside_it_and_a_folder_holds_everything(answers: Answers, tmp_path: Path) -> None:
    assert Place.of(tmp_path / "plan.pdf").figures == tmp_path / "plan-figures"
    path = write_answers(answers, NAMES, answers.created, tmp_path / "plan.pdf", "brief")
    assert path == tmp_path / "plan.pdf"
    beside = {file.name for file in (tmp_path / "plan-figures").iterdir()}
    # Whatever a template shows, every figure of every answer is there with its data, and every finding.
    drawn = ("speedup-by-batch", "cost-fit", "fidelity-errors", "capacity")
    assert {f"{name}.{ending}" for name in drawn for ending in ("svg", "csv")} <= beside
    assert {"findings.json", "capacity.json", "fidelity.json"} <= beside
    for file in (tmp_path / "plan-figures").glob("*.csv"):
        rows = list(csv.reader(file.read_text(encoding="utf-8").splitlines()))
        assert len(rows) > 1, file.name
        assert len({len(row) for row in rows}) == 1, file.name
    text = (tmp_path / "plan-figures" / "capacity.json").read_text(encoding="utf-8")
    assert from_json(CapacityFindings, text, "capacity.json") == made_capacity()
    inside = write_answers(answers, NAMES, answers.created, tmp_path / "folder", "brief")
    assert inside == tmp_path / "folder" / "report.pdf"
    assert (tmp_path / "folder" / "figures" / "capacity.csv").is_file()
    assert (tmp_path / "folder" / "findings.json").is_file()
    assert inside.read_bytes() == path.read_bytes()


def test_answers_without_a_study_stand_by_themselves(answers: Answers, tmp_path: Path) -> None:
    alone = Answers(answers.created, None, answers.answered, answers.unanswered)
    for template in ("study", "brief", "capacity"):
        text = text_of(PdfReader(write_answers(alone, NAMES, alone.created, tmp_path / f"{template}.pdf", template)))
        assert bare("Throughput under speculation is predicted within") in text


def test_what_cannot_be_written_is_an_error(answers: Answers, tmp_path: Path) -> None:
    nothing = Answers("", None, (), (Unanswered("Capacity plan", "there is no scenario"),))
    with pytest.raises(ReportError, match=r"nothing can be answered .*Capacity plan: there is no scenario"):
        write_answers(nothing, NAMES, "2026-01-01", tmp_path / "x.pdf")
    without = Answers(answers.created, answers.study, answers.answered[:1], nothing.unanswered)
    with pytest.raises(ReportError, match="needs a capacity plan; there is none because there is no scenario"):
        write_answers(without, NAMES, answers.created, tmp_path / "x.pdf", "capacity")
    with pytest.raises(ReportError, match="created must be an ISO 8601 time, got 'noon'"):
        write_answers(answers, NAMES, "noon", tmp_path / "x.pdf")
    twice = Answers(answers.created, None, (answers.answered[0],) * 2, ())
    with pytest.raises(ReportError, match="two drawings have this name"):
        write_answers(twice, NAMES, answers.created, tmp_path / "x.pdf")
    assert not list(tmp_path.iterdir())


def test_a_question_without_data_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which questions are asked and what becomes of their answers, with quick stand-ins for two of them."""

    def refuse(*_: object) -> None:
        raise ReportError("size: needs three sizes, got 1")

    def plan(*_: object, **__: object) -> CapacityFindings:
        return made_capacity()

    monkeypatch.setattr(reports.writing.collect, "QUESTIONS", (TraceQuestion("size", "Drafter size", refuse),))  # type: ignore[arg-type]
    monkeypatch.setattr(reports.writing.collect, "_bundled_cascade", refuse)
    monkeypatch.setattr(reports.writing.collect, "plan_capacity", plan)
    traces = clustered(np.random.default_rng(1), sequences=6, tokens=24)
    inputs = Inputs(traces={"set": traces}, folders={"set": Path()}, fidelities={"v": made_fidelity()})
    told: list[tuple[str, int, int]] = []
    found = collect(inputs, Options(workers=1), lambda *step: told.append(step))
    assert [one.key for one in found.answered] == ["fidelity", "capacity"]
    reasons = {one.title: one.reason for one in found.unanswered}
    assert reasons == {
        "Tuned policies": "there is no result of paceline tune among the inputs",
        "Drafter size": "size: needs three sizes, got 1",
        "Cascade": "size: needs three sizes, got 1",
    }
    assert found.created == max("2026-01-02T00:00:00+00:00", made_fidelity().created)
    ends = {name: (done, total) for name, done, total in told}
    assert list(ends) == ["study", "size", "cascade", "fidelity", "capacity"]
    assert all(done == total for done, total in ends.values())
    brief = collect(inputs, Options(template="capacity", workers=1))
    assert [one.key for one in brief.answered] == ["capacity"]


def test_of_several_inputs_each_answer_and_figure_bears_a_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two TraceSets and two validations: the report is about the first, and nothing clashes."""

    def quick(*_: object) -> tuple[object, object]:
        return capacity_part(made_capacity()), made_capacity()

    def none(*_: object) -> None:
        raise ReportError("left out of this test")

    monkeypatch.setattr(reports.writing.collect, "QUESTIONS", (TraceQuestion("size", "Drafter size", quick),))  # type: ignore[arg-type]
    monkeypatch.setattr(reports.writing.collect, "_bundled_cascade", none)
    monkeypatch.setattr(reports.writing.collect, "plan_capacity", lambda *_, **__: made_capacity())
    sets = {
        name: clustered(np.random.default_rng(i), sequences=6, tokens=24) for i, name in enumerate(("one", "two"))
    }
    inputs = Inputs(
        traces=sets, folders=dict.fromkeys(sets, Path()), fidelities={"v": made_fidelity(), "w": made_fidelity()}
    )
    found = collect(inputs, Options(workers=1))
    keys = [one.key for one in found.answered]
    assert keys == ["study-two", "size-one", "size-two", "fidelity-v", "fidelity-w", "capacity"]
    path = write_answers(found, inputs.names, found.created, tmp_path / "both.pdf")
    text = text_of(PdfReader(path))
    for title in ("Speed-up: two", "Capacity plan: one", "Capacity plan: two", "Predicted against measured: w"):
        assert bare(title) in text
    names = {file.name for file in (tmp_path / "both-figures").iterdir()}
    assert {"two-speedup-map.svg", "speedup-map.svg", "v-fidelity-errors.csv", "w-fidelity-errors.csv"} <= names
    assert {"study-two.json", "findings.json", "size-one.json"} <= names
