"""The page on policies says what its findings say, and these can be made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.common.records import from_json
from calibration.traces import bundled
from studies.hybrid.confidence import confidence_cell
from studies.hybrid.gap import NEVER_BELOW, judged
from studies.hybrid.study import PolicyStudy
from studies.pages.policies import main, page

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def study() -> PolicyStudy:
    return from_json(PolicyStudy, (DOCS / "policies.json").read_text(encoding="utf-8"), "policies.json")


def test_the_page_is_fresh(study: PolicyStudy, tmp_path: Path) -> None:
    """`python -m studies.pages.policies docs` writes it again."""
    assert (DOCS / "policies.md").read_text(encoding="utf-8") == page(study)
    (tmp_path / "policies.json").write_bytes((DOCS / "policies.json").read_bytes())
    main([str(tmp_path)])
    assert (tmp_path / "policies.md").read_text(encoding="utf-8") == page(study)


def test_a_cell_of_it_comes_out_again(study: PolicyStudy) -> None:
    kept = study.lengths[0]
    name, drafter = kept.dataset.split(", ")
    again, asked = confidence_cell(name, bundled(name), drafter, kept.batch)
    assert again.best_tokens == kept.best_tokens
    for one, other in ((again.best, kept.best), (again.oracle, kept.oracle)):
        assert one.value == pytest.approx(other.value, rel=1e-6)
    for result in kept.policies:
        assert again.policy(result.policy).gap_share.value == pytest.approx(result.gap_share.value, rel=1e-3)
    (target,) = judged(asked)
    before = next(t for t in study.length_targets if (t.dataset, t.batch) == (kept.dataset, kept.batch))
    assert target.margin.value == pytest.approx(before.margin.value, rel=1e-3)
    assert target.margin.low > before.margin.low  # judged alone, here; there with the other cells


def test_what_was_missed_or_is_open_is_said(study: PolicyStudy) -> None:
    rest = [one for one in (*study.per_round.targets, *study.length_targets) if not one.met]
    assert {one.verdict for one in rest} == {"open", "missed"}
    text = page(study)
    for one in rest:
        assert one.reached.value is not None
        assert f"{one.dataset} at {one.batch}: {100 * one.reached.value:.1f}%" in text


def test_only_what_bounds_for_all_targets_show_is_called_met(study: PolicyStudy) -> None:
    for one in (*study.per_round.targets, *study.per_step.targets, *study.length_targets):
        assert one.met == (one.margin.low is not None and one.margin.low >= 0)
    counted = [one for one in study.per_round.targets if one.target == NEVER_BELOW and one.policy == "forecast ngram"]
    assert f"{sum(one.met for one in counted)} of {len(counted)}" in page(study)
