"""Words and numbers of a report."""

from __future__ import annotations

import io
import unicodedata

import numpy as np
import pytest
from drawn import clustered
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from analysis import StudySettings, study
from analysis.common.bootstrap import Estimate
from calibration.common.errors import ReportError
from reports import summary_table
from reports.page.document import Table
from reports.page.text import breakable, count, estimate, listing, parameters, percent, plain, short
from reports.questions.answer import judged


@given(st.text())
def test_plain_text_can_be_set_and_loses_nothing(text: str) -> None:
    shown = plain(text)
    assert all(unicodedata.category(c) not in {"Cc", "Cf", "Cn", "Cs"} for c in shown)
    # Undo the codes: the original comes back (where it held no such code of its own).
    if "\\u{" not in text:
        pieces = shown.split("\\u{")
        back = pieces[0] + "".join(chr(int(p.split("}")[0], 16)) + p.split("}", 1)[1] for p in pieces[1:])
        assert back == text


@given(st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cc"])))
def test_breakable_text_has_no_long_word_and_the_same_letters(text: str) -> None:
    shown = breakable(text, 10)
    assert shown.replace("\u200b", "") == text
    assert all(len(word) <= 10 for word in shown.replace("\u200b", " ").split())


@given(st.text(), st.integers(5, 30))
def test_short_names_fit(name: str, limit: int) -> None:
    assert len(short(name, limit)) <= limit
    if len(plain(name)) <= limit:
        assert short(name, limit) == plain(name)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Estimate(1.174, 1.096, 1.252, 9), "1.17 (1.10\u20131.25)"),
        (Estimate(1.174, None, None, 1), "1.17"),
        (Estimate(None, None, None, 0), "\u2014"),
    ],
)
def test_estimates(value: Estimate, shown: str) -> None:
    assert estimate(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Estimate(0.121, 0.093, 0.15, 9), "+12 (+9 to +15)"),
        (Estimate(-0.004, -0.02, 0.004, 9), "0 (\u22122 to 0)"),
        (Estimate(None, None, None, 0), "\u2014"),
    ],
)
def test_percent(value: Estimate, shown: str) -> None:
    assert percent(value) == shown


def test_numbers_and_lists() -> None:
    assert [parameters(v) for v in (None, 0, 999, 134_515_008, 70_553_706_496)] == [
        "unknown",
        "0",
        "999",
        "134.5 M",
        "70.6 B",
    ]
    assert count(18432.0) == "18,432"
    assert [listing(list(names)) for names in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]


def test_a_table_with_a_hole_is_refused() -> None:
    with pytest.raises(ReportError, match="table 'Speeds': needs rows of equal length, got lengths \\[1, 2\\]"):
        Table("Speeds", ("a", "b"), (("1",),), "lr", ("auto", "auto"))
    with pytest.raises(ReportError, match="table 'Speeds'"):
        Table("Speeds", ("a",), (), "l", ("auto",))


def test_the_terminal_shows_every_drafter_and_the_verdict() -> None:
    traces = clustered(np.random.default_rng(1), sequences=9, tokens=30, drafters=("slow", "[red]lookup"))
    settings = StudySettings(draft_tokens=(1, 2), batches=(1, 2), draws=100)
    findings = study(traces, settings=settings, workers=1)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(findings))
    text = console.export_text()
    head = findings.answer.headline
    assert "slow" in text
    assert "[red]lookup" in text  # a name is not markup
    assert estimate(judged(head)) in text
    assert "the throughput of no speculation" in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 80
