"""Figures: text as text, no rasters, told apart without colour, the same bytes every time."""

from __future__ import annotations

import csv
import io
import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from drawn import clustered

from analysis import Findings, StudySettings, study
from calibration.common.errors import ReportError
from reports.page.drawing import look
from reports.questions.figures import Drawing, draw_all
from reports.writing.report import data_csv


@pytest.fixture(scope="module")
def findings() -> Findings:
    settings = StudySettings(draft_tokens=(1, 2, 4), batches=(1, 2), draws=200)
    return study(clustered(np.random.default_rng(1), sequences=12, tokens=40), settings=settings, workers=1)


@pytest.fixture(scope="module")
def drawings(findings: Findings) -> dict[str, Drawing]:
    return draw_all(findings)


def words(drawing: Drawing) -> list[str]:
    """Every text element of an SVG."""
    root = ElementTree.fromstring(drawing.svg)
    return ["".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")]


def test_figures_are_vectors_with_live_text_in_the_font_of_the_page(drawings: dict[str, Drawing]) -> None:
    for drawing in drawings.values():
        assert "<image" not in drawing.svg
        assert len(words(drawing)) > 5
        fonts = set(re.findall(r"font-family: ([^;\"]*)", drawing.svg))
        assert fonts == {"'Libertinus Serif', 'STIXGeneral', serif"}
        assert "dc:date" not in drawing.svg


def test_every_caption_has_its_label_and_sample_size(drawings: dict[str, Drawing]) -> None:
    for drawing in drawings.values():
        assert re.search(
            r"\[(measured|simulated|fitted|extrapolated)[^\]]*(n = 12 requests|timed steps)", drawing.caption
        )
        assert len(drawing.alt) > 60


def test_every_figure_has_data_of_equal_keys_that_hold_what_is_drawn(
    drawings: dict[str, Drawing], findings: Findings
) -> None:
    for drawing in drawings.values():
        rows = list(csv.DictReader(io.StringIO(data_csv(drawing))))
        assert len(rows) == len(drawing.data) > 0
        assert list(rows[0]) == list(drawing.data[0])
    shown = {
        (row["drafter"], row["draft_tokens"], row["batch"]): row["speedup"] for row in drawings["speedup-map"].data
    }
    for cell in findings.speedup:
        if cell.domain is None:
            assert shown[cell.drafter, cell.draft_tokens, cell.batch] == cell.speedup.value
    fits = drawings["cost-fit"].data
    assert len(fits) == sum(len(fit.points) for fit in findings.cost_fits)
    breakdown = drawings["time-breakdown"].data
    assert [row["drafter"] for row in breakdown].count("none") == 1
    for row in breakdown:
        parts = [row[f"{part}_ms_per_token"] for part in ("prefill", "draft", "verify", "overhead")]
        assert sum(parts) == pytest.approx(1000 / row["tokens_per_second"], rel=1e-4)


def test_a_figure_without_data_or_with_ragged_records_is_refused() -> None:
    with pytest.raises(ReportError, match="figure empty: needs data"):
        data_csv(Drawing("empty", "<svg/>", "c", "a"))
    with pytest.raises(ReportError, match="figure ragged: its records must all have the same keys"):
        data_csv(Drawing("ragged", "<svg/>", "c", "a", data=({"x": 1}, {"y": 2})))


def test_missing_numbers_are_empty_in_the_data() -> None:
    drawing = Drawing("d", "<svg/>", "c", "a", data=({"x": None, "y": 0.1234567, "z": True},))
    assert data_csv(drawing) == "x,y,z\n,0.123457,true\n"


def test_axes_name_what_they_show(drawings: dict[str, Drawing]) -> None:
    assert "Batch size (requests decoded together)" in words(drawings["speedup-by-batch"])
    assert {"slow", "lookup", "no speculation"} <= set(words(drawings["speedup-by-batch"]))
    assert {"domain-0", "domain-1", "domain-2", "all"} <= set(words(drawings["acceptance-by-domain"]))
    assert "Depth in the draft" in words(drawings["acceptance-by-depth"])
    assert "Tokens per round" in words(drawings["constant-rate-formula"])
    assert {"prefill", "draft", "verify"} <= set(words(drawings["time-breakdown"]))


def test_the_map_holds_the_speedups(drawings: dict[str, Drawing], findings: Findings) -> None:
    shown = {word.rstrip("*") for word in words(drawings["speedup-map"])}
    for cell in findings.speedup:
        if cell.domain is None:
            assert f"{cell.speedup.value:.2f}" in shown


def test_same_findings_same_svg(drawings: dict[str, Drawing], findings: Findings) -> None:
    assert draw_all(findings) == drawings


def test_drafters_are_told_apart_without_colour() -> None:
    looks = [look(i) for i in range(8)]
    assert len({style["marker"] for style in looks}) == 8
    # Of neighbours, which are drawn side by side, at least one more thing differs: the line or the lightness.
    for one, other in itertools.pairwise(looks):
        assert one["linestyle"] != other["linestyle"] or abs(grey(one["color"]) - grey(other["color"])) > 0.15
    assert look(8) == look(0)


def grey(colour: str) -> float:
    """Lightness of a colour printed in grey, 0 to 1 (Rec. 601)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue
