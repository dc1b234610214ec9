"""The report: a tagged PDF that says the answer, shows vectors only, and is the same every time."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import clustered, partly
from pypdf import PdfReader
from pypdf.generic import DictionaryObject, IndirectObject

from analysis import Findings, StudySettings, study
from analysis.common.bootstrap import Estimate
from analysis.speedup.speedup import Schedule
from calibration.common.errors import ReportError
from calibration.common.files import write_whole
from calibration.traces import DrafterInfo, Manifest, PromptSource, TraceSet
from calibration.traces.manifest import CostConstants, LinearCost
from reports import write_report
from reports.questions.answer import judged, pays_at, study_guidelines, verdict
from reports.questions.figures import draw_all

SETTINGS = StudySettings(draft_tokens=(1, 2, 4), batches=(1, 2), draws=200)
HOSTILE = (
    '#panic("x") $\\alpha_1$ *bold* _it_ <label> @ref `raw` // no \\ [c] {d} & <svg/> %s "quotes"',
    "\u8349\u7a3f\u8005 \U0001f6b4 \u202eright-to-left\u202c \x07bell",
    "a-name-without-any-place-to-break-" * 5,
)


@pytest.fixture(scope="module")
def findings() -> Findings:
    return study(clustered(np.random.default_rng(1), sequences=12, tokens=40), settings=SETTINGS, workers=1)


@pytest.fixture(scope="module")
def written(findings: Findings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(findings, tmp_path_factory.mktemp("report") / "report.pdf")


def bare(text: str) -> str:
    """Text without what depends on where its lines break: spaces, hyphens and places to break."""
    return re.sub(r"[\s\u200b\xad-]", "", text)


def text_of(path: Path, pages: slice = slice(None)) -> str:
    """All text of a PDF, bare."""
    return bare("".join(page.extract_text() for page in PdfReader(path).pages[pages]))


def resources(pdf: PdfReader, kind: str) -> list[DictionaryObject]:
    """Every XObject of a kind, inside others too."""
    found, waiting, seen = [], [page.get("/Resources") for page in pdf.pages], set()
    while waiting:
        here = waiting.pop()
        here = here.get_object() if isinstance(here, IndirectObject) else here
        if not here:
            continue
        for reference in (here.get("/XObject") or {}).values():
            if isinstance(reference, IndirectObject) and reference.idnum in seen:
                continue
            seen.add(getattr(reference, "idnum", None))
            thing = reference.get_object()
            if thing.get("/Subtype") == kind:
                found.append(thing)
            waiting.append(thing.get("/Resources"))
    return found


def structure(pdf: PdfReader) -> list[tuple[str, str | None]]:
    """(tag, alt text) of every structure element."""
    found, waiting = [], [pdf.trailer["/Root"]["/StructTreeRoot"]]
    while waiting:
        here = waiting.pop()
        here = here.get_object() if isinstance(here, IndirectObject) else here
        if isinstance(here, list):
            waiting += here
        elif isinstance(here, DictionaryObject):
            if "/S" in here:
                found.append((str(here["/S"]), here.get("/Alt")))
            waiting.append(here.get("/K"))
    return found


def test_the_pdf_is_tagged_titled_and_has_a_language(written: Path) -> None:
    pdf = PdfReader(written)
    root = pdf.trailer["/Root"]
    assert root["/MarkInfo"]["/Marked"]
    assert root["/Lang"] == "en"
    assert pdf.metadata is not None
    assert pdf.metadata.title == "Does speculative decoding pay?"
    metadata = root["/Metadata"].get_data().decode()
    assert "pdfuaid" in metadata
    assert "pdfaid" in metadata
    tags = [tag for tag, _ in structure(pdf)]
    assert tags.count("/H1") == 8  # the title and seven sections
    assert tags.count("/TH") > 20
    assert 5 <= len(pdf.pages) <= 9


def test_figures_are_vectors_with_alt_texts(written: Path, findings: Findings) -> None:
    pdf = PdfReader(written)
    assert resources(pdf, "/Image") == []
    alts = [alt for tag, alt in structure(pdf) if tag == "/Figure"]
    assert sorted(str(alt) for alt in alts) == sorted(drawing.alt for drawing in draw_all(findings).values())
    assert len(alts) == 7


def test_page_one_has_question_and_answer(written: Path, findings: Findings) -> None:
    first = text_of(written, slice(1))
    speedup = judged(findings.answer.headline)
    for words in (
        "which of the two recorded drafters speeds up decoding",
        "lookup pays at every batch size simulated (1 and 2)",
        f"{speedup.value:.2f} (simultaneous 95% interval {speedup.low:.2f} to {speedup.high:.2f} over requests",
        "Table 1",
        "Figure 1",
        "[simulated; n = 12 requests, 3 domains]",
    ):
        assert bare(words) in first


def test_every_section_and_label_is_there(written: Path) -> None:
    text = text_of(written)
    for title in (
        "Where the numbers come from",
        "Acceptance by domain and drafter",
        "Acceptance by depth, and the constant-rate formula",
        "The speed-up map",
        "Where the time goes, and how well it is known",
        "Guidelines in plain words",
        "Limits of validity",
        "[measured; n = 12 requests",
        "[measured, fitted]",
        "bootstrap replicates over whole requests",
    ):
        assert bare(title) in text


def test_same_findings_same_bytes(written: Path, findings: Findings, tmp_path: Path) -> None:
    again = write_report(Findings.from_json(findings.to_json()), tmp_path / "deep" / "other.pdf")
    assert again.read_bytes() == written.read_bytes()
    for one in sorted((written.parent / "figures").iterdir()):
        assert (again.parent / "figures" / one.name).read_bytes() == one.read_bytes()


def test_findings_and_figures_lie_beside_the_pdf(written: Path, findings: Findings) -> None:
    names = sorted(p.relative_to(written.parent).as_posix() for p in written.parent.rglob("*") if p.is_file())
    figures = (
        "acceptance-by-depth",
        "acceptance-by-domain",
        "constant-rate-formula",
        "cost-fit",
        "speedup-by-batch",
        "speedup-map",
        "time-breakdown",
    )
    drawn = [f"figures/{name}.{ending}" for name in figures for ending in ("csv", "svg")]
    assert names == [*drawn, "findings.json", "report.pdf"]
    assert Findings.from_json((written.parent / "findings.json").read_text()) == findings


def test_progress_ends_at_its_total(findings: Findings, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    write_report(findings, tmp_path / "report.pdf", progress=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == list(range(1, 10))
    assert steps[-1] == (9, 9)


def hostile_manifest(plain: Manifest) -> dict[str, Any]:
    return {
        "command": f"paceline calibrate {HOSTILE[0]} {HOSTILE[2]}",
        "verifier": plain.verifier.model_copy(update={"name": HOSTILE[0]}),
        "drafters": tuple(
            DrafterInfo(name=name, paradigm=HOSTILE[1], deterministic=False, dtype=HOSTILE[0])
            for name in (HOSTILE[1], HOSTILE[2])
        ),
        "device": plain.device.model_copy(update={"name": HOSTILE[1]}),
        "software": {HOSTILE[0]: HOSTILE[2]},
        "prompts": (PromptSource(name=HOSTILE[2], sha256=None, domain=HOSTILE[0], prompts=1),),
        "notes": HOSTILE,
        "unknown": HOSTILE,
    }


def test_hostile_names_are_shown_and_not_interpreted(tmp_path: Path) -> None:
    """Markup of typst, SVG and TeX, letters that no font here has, control characters, a name without a break."""
    plain = clustered(np.random.default_rng(1), sequences=9, tokens=30, drafters=(HOSTILE[1], HOSTILE[2]))
    sequences = plain.sequences.set_column(1, "domain", [[*HOSTILE] * 3])
    timings = plain.timings.set_column(
        0, "model", [[HOSTILE[0] if m == "verifier" else m for m in plain.timings["model"].to_pylist()]]
    )
    traces = TraceSet.build(
        plain.manifest.model_copy(update=hostile_manifest(plain.manifest)),
        {"sequences": sequences, "positions": plain.positions, "timings": timings},
    )
    text = text_of(write_report(study(traces, settings=SETTINGS, workers=1), tmp_path / "report.pdf"))
    assert '#panic("x")$\\alpha_1$*bold*_it_<label>@ref`raw`' in text
    assert "\\u{8349}\\u{7a3f}\\u{8005}" in text
    assert "\\u{202e}" in text
    assert "\\u{7}bell" in text
    assert bare(HOSTILE[2]) in text


def test_a_folder_that_cannot_be_written_is_a_report_error(findings: Findings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=r"report\.pdf: cannot be written"):
        write_report(findings, tmp_path / "file" / "report.pdf")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.pdf"
    target.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"best": ()}, "figure speedup-by-batch: needs best draft lengths"),
        ({"depth": ()}, "figure acceptance-by-depth: needs depth points"),
        ({"runs": ()}, "figure time-breakdown: needs runs"),
        ({"speedup": ()}, "figure speedup-map: needs speed-up cells"),
    ],
)
def test_findings_with_a_hole_are_refused(findings: Findings, missing: dict[str, Any], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        draw_all(dataclasses.replace(findings, **missing))


def test_a_bad_date_is_named(findings: Findings, tmp_path: Path) -> None:
    facts = dataclasses.replace(findings.provenance, created="2026-13-01")
    with pytest.raises(ReportError, match="created must be an ISO 8601 time, got '2026-13-01'"):
        write_report(dataclasses.replace(findings, provenance=facts), tmp_path / "report.pdf")


def with_speedups(findings: Findings, factors: dict[int, float], costs: float = 0.05) -> Findings:
    """Findings in which `lookup` has these speed-ups by batch, the others 0.5, and the answer to match.

    Bounds reach 0.05 to both sides over requests, and `costs` over requests and costs.
    """
    from analysis.speedup.speedup import crossovers
    from analysis.speedup.study import _answer

    best = []
    for row in findings.best:
        value = factors[row.batch] if row.drafter == "lookup" else 0.5
        requests, both = (Estimate(value, value - reach, value + reach, 12) for reach in (0.05, costs))
        best.append(
            dataclasses.replace(
                row,
                speedup=requests,
                simultaneous=requests,
                with_costs=both,
                pays=value - 0.05 > 1,
                pays_with_costs=value - costs > 1,
                loses=value + costs < 1,
                draft_tokens=row.speculative_tokens if value > 1 else 0,
            )
        )
    crossing = crossovers(best)
    return dataclasses.replace(findings, best=tuple(best), crossovers=tuple(crossing), answer=_answer(best, crossing))


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({1: 1.5, 2: 1.2}, "lookup pays at every batch size simulated (1 and 2). At batch 1 drafting "),
        ({1: 1.5, 2: 1.2}, "1.50 (simultaneous 95% interval 1.45 to 1.55 over requests and fitted costs) times"),
        ({1: 1.5, 2: 0.9}, "lookup pays at batch 1; loses at batch 2."),
        ({1: 1.5, 2: 1.02}, "lookup pays at batch 1; not shown at batch 2."),
        (
            {1: 0.9, 2: 0.8},
            "No: none of the two drafters pays at any batch size simulated. The least slow at batch 1 is",
        ),
        ({1: 0.98, 2: 0.8}, "Not shown: none of the two drafters is shown to pay at any batch size simulated."),
        ({1: 0.9, 2: 1.3}, "No: none of the two drafters pays at batch 1. lookup pays at batch 2; loses at batch 1."),
        (
            {1: 1.01, 2: 1.3},
            "Not shown: none of the two drafters is shown to pay at batch 1. lookup pays at batch 2; ",
        ),
    ],
)
def test_the_verdict_follows_the_numbers(findings: Findings, factors: dict[int, float], words: str) -> None:
    assert words in verdict(with_speedups(findings, factors))


def test_gains_within_the_error_of_the_costs_are_called_so(findings: Findings) -> None:
    """Over requests 1.15 to 1.25 at batch 2, with costs 0.8 to 1.6: headline, table and advice all say so."""
    changed = with_speedups(findings, {1: 1.5, 2: 1.2}, costs=0.4)
    only = "At batch 2 that holds for the requests only: the gain is within the error of the fitted costs."
    assert verdict(changed).endswith(only)
    advice = {one.lead: one.text for one in study_guidelines(changed)}
    assert advice["Whether."] == "Speculate with lookup at batch 1 and 2 (at batch 2 for the requests only)."
    assert "at batch 2 the gain is within the error of the fitted costs" in advice["First."]
    assert pays_at(changed.answer.crossover) == "1, (2)"
    sure = with_speedups(findings, {1: 1.5, 2: 1.5}, costs=0.4)
    assert "requests only" not in verdict(sure)
    assert "First." not in {one.lead for one in study_guidelines(sure)}


def test_imports_say_whose_costs_and_which_requests(tmp_path: Path) -> None:
    """Stated constants instead of timings, and a drafter that was recorded on some requests of one domain."""
    whole = partly(clustered(np.random.default_rng(1), sequences=6, tokens=30), "lookup", ["s0", "s3"])
    costs = CostConstants(
        source="a paper",
        verifier=LinearCost(base_s=0.01),
        drafters={"slow": LinearCost(base_s=0.009), "lookup": LinearCost(base_s=0.0001, charged="per_round")},
    )
    manifest = whole.manifest.model_copy(update={"costs": costs, "unknown": ("who timed it",)})
    traces = TraceSet.build(manifest, {"sequences": whole.sequences, "positions": whole.positions})
    findings = study(traces, settings=SETTINGS, workers=1)
    assert findings.cost_source == "stated"
    assert {row.domain for row in findings.best if row.drafter == "lookup"} == {None, "domain-0"}
    text = text_of(write_report(findings, tmp_path / "report.pdf"))
    for words in (
        "simulated with stated costs; n = 2 to 6 requests by drafter",
        "they are constants stated with the imported traces",
        "Not every drafter was recorded on every request",
        "none, requests of lookup",
        "who timed it",
    ):
        assert bare(words) in text
    assert not (tmp_path / "figures" / "cost-fit.svg").exists()


def test_one_drafter_one_domain_one_batch(tmp_path: Path) -> None:
    """The smallest study still makes a whole report; so does one of five drafters."""
    for count, batches in ((1, (1,)), (5, (1, 2))):
        names = tuple(itertools.islice(("alone", "b", "c", "d", "e"), count))
        traces = clustered(np.random.default_rng(3), sequences=4, tokens=24, drafters=names)
        settings = StudySettings(draft_tokens=(2,), batches=batches, draws=100)
        path = write_report(study(traces, settings=settings, workers=1), tmp_path / f"{count}.pdf")
        assert bare("Limits of validity") in text_of(path)


def test_advice_follows_a_speed_up_that_dips_and_comes_back(findings: Findings) -> None:
    """The headline's list, the advice and the schedule are of the same batch sizes."""
    changed = with_speedups(findings, {1: 1.5, 2: 1.02})
    schedule = Schedule("lookup", None, (1, 2), (2, 2), (0.0, 0.14), ())
    best = [dataclasses.replace(row, draft_tokens=row.batch * 2) for row in changed.best]
    told = dataclasses.replace(changed, best=tuple(best), schedules=(schedule,))
    whether, how_many = study_guidelines(told)[:2]
    assert whether.text.startswith("Speculate with lookup at batch 1. No fixed draft length among those tried")
    assert "is shown to pay at batch 2. A policy that chooses the length by request or round" in whether.text
    assert "Draft 2 tokens at batch 1 and 2. At batch 2 no speculation may do as well." in how_many.text
    assert "it gives up at most 14% (batch 2)" in how_many.text
    broken = dataclasses.replace(schedule, draft_tokens=(0, 2), breaks=(1,))
    text = study_guidelines(dataclasses.replace(changed, schedules=(broken,)))[1].text
    assert "Draft 0 tokens (no speculation) at batch 1 and 2 tokens at batch 2." in text
    assert "batch 1 breaks it and keeps its fastest length" in text
