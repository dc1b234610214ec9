"""Generalist against specialists: known answers on made-up traces, and the bundled study end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from request_tables import HOMES, ROUNDS_ONLY, specialised
from shared_data import shared_data

from analysis.common.records import from_json, to_json
from analysis.knowledge import KnowledgeFindings, study_knowledge
from analysis.knowledge.compare import cast
from analysis.knowledge.study import published_rows
from analysis.routing.served import cheap_prices
from calibration.common.errors import ReplayError, ReportError
from calibration.traces import bundled
from calibration.traces.traceset import subset


@pytest.fixture(scope="module")
def known() -> KnowledgeFindings:
    return study_knowledge(
        specialised(),
        generalist="both",
        specialists=HOMES,
        draft_tokens=3,
        lengths=(3,),
        prices=[ROUNDS_ONLY],
        accuracies=(0.0, 0.5, 1.0),
        draws=200,
    )


def test_a_specialist_better_by_construction_is_found_better_at_home_and_worse_away(known: KnowledgeFindings) -> None:
    for row in known.paired:
        own, general = (4.0, 2.0) if row.home else (1.0, 2.0)
        assert row.specialist_tokens.value == pytest.approx(own, rel=0.02)
        assert row.generalist_tokens.value == pytest.approx(general, rel=0.02)
        # Six prompts, all of one sign: p = 2 / 2^6, times two in each family of two.
        assert row.p_value == pytest.approx(2 / 64)
        assert row.p_adjusted == pytest.approx(4 / 64)
        assert row.verdict == "cannot tell apart"
    assert known.pooled.verdict == "better"
    assert known.pooled.p_value == pytest.approx(2 / 4096)  # twelve prompts, exact
    assert known.pooled.exact
    assert known.pooled.difference.requests == 12


def test_transfer_is_relative_to_the_generalist_without_the_bonus(known: KnowledgeFindings) -> None:
    cells = {(cell.drafter, cell.domain): cell.relative.value for cell in known.transfer}
    assert cells["coder", "code"] == pytest.approx(3.0, rel=0.02)
    assert cells["coder", "poems"] == 0.0


def test_a_router_of_accuracy_p_has_the_value_the_formula_says(known: KnowledgeFindings) -> None:
    (router,) = known.routers
    tokens = 8 * 40.0 + 4 * 36.0
    right, general = tokens / 4, tokens / 2
    # A miss goes to the generalist (a round for every two tokens) or to the other specialist (a round for each).
    wrong = (tokens / 2 + tokens) / 2
    for point in router.curve:
        rounds = point.accuracy * right + (1 - point.accuracy) * wrong
        assert point.tokens_per_round.value == pytest.approx(tokens / rounds, rel=1e-5)
        # A prefill of a second for each of twelve requests, then a second a round.
        assert point.speedup.value == pytest.approx((12 + tokens) / (12 + rounds), rel=1e-5)
        careful = point.accuracy * right + (1 - point.accuracy) * general
        assert point.speedup_careful.value == pytest.approx((12 + tokens) / (12 + careful), rel=1e-5)
    assert router.break_even.value == pytest.approx((wrong - general) / (wrong - right), rel=1e-5)
    assert router.break_even_at_home == router.break_even
    assert router.chance == pytest.approx(1 / 3)
    assert router.level("label").tokens_per_round.value == pytest.approx(4.0)
    assert router.level("oracle by request").speedup == router.level("label").speedup
    assert router.gain.value == pytest.approx((12 + general) / (12 + right), rel=1e-5)


def test_findings_survive_json(known: KnowledgeFindings) -> None:
    assert from_json(KnowledgeFindings, to_json(known), "knowledge.json") == known


def test_roles_of_the_bundled_students_are_read_from_the_manifest() -> None:
    general, special = cast(bundled("smollm2-135m-cpu-distilled"), None, None)
    assert (general.name, general.home, general.texts) == ("size-6.7", None, 1585)
    assert {s.name: s.home for s in special} == {
        f"specialist-{domain}": domain for domain in ("code", "creative", "mathematics", "science")
    }
    assert {s.parameters for s in special} == {general.parameters}
    assert all(s.texts is not None and s.texts < 600 for s in special)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({}, "no drafter says that it trained on one domain alone"),
        ({"specialists": {"codr": "code"}}, "specialists: not in the TraceSet, got 'codr'; did you mean 'coder'?"),
        ({"specialists": {"coder": "cod"}}, "specialists.coder: no such domain, got 'cod'; did you mean 'code'?"),
        ({"specialists": HOMES}, "exactly one drafter of the specialists' size .* got none"),
        ({"specialists": HOMES, "generalist": "bth"}, "generalist: not in the TraceSet, got 'bth'"),
        ({"specialists": HOMES, "generalist": "poet"}, "generalist: must not be one of the specialists, got 'poet'"),
        (
            {"specialists": {"coder": "code", "poet": "code"}, "generalist": "both"},
            "each domain must have one specialist",
        ),
    ],
)
def test_roles_that_are_not_clear_are_refused(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(ReplayError, match=fault):
        study_knowledge(specialised(4), **given)


def test_bundled_students_end_to_end() -> None:
    """What the recording says: the code specialist pays at home, and a router that errs half of the time does not."""
    whole = bundled("smollm2-135m-cpu-distilled")
    ids = [
        name
        for name, domain in zip(*(whole.sequences[c].to_pylist() for c in ("sequence_id", "domain")), strict=True)
        if domain in ("code", "science", "grounded")
    ]
    names = ["size-6.7", "specialist-code", "specialist-science"]
    found = study_knowledge(
        subset(whole, ids),
        specialists={"specialist-code": "code", "specialist-science": "science"},
        prices=[cheap_prices(whole, names)],
        lengths=(2,),
        draws=400,
    )
    assert found.generalist.name == "size-6.7"
    homes = {row.specialist: row for row in found.paired if row.home}
    assert homes["specialist-code"].verdict == "better"
    assert homes["specialist-science"].verdict == "cannot tell apart"
    assert not any(row.verdict == "better" for row in found.paired if not row.home)
    (router,) = found.routers
    levels = [router.level(c).speedup.value or 0 for c in ("generalist", "label", "oracle by request")]
    assert levels == sorted(levels)
    assert (router.level("oracle by round").speedup.value or 0) > levels[-1]
    assert 0.5 < (router.break_even.value or 0) < 1
    assert router.break_even.low is not None
    assert len(found.transfer) == 6


def test_published_tables(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="must hold domain-tuned-draft"):
        published_rows(tmp_path)
    table = tmp_path / "domain-tuned-draft" / "ablations.csv"
    table.parent.mkdir()
    table.write_text(
        "ablation,setting,quantity,value\n"
        "A1_dataset_size,generic (0%),acceptance_rate,0.5\nA1_dataset_size,10%,acceptance_rate,0.6\n"
        "A2_domain_generalization,Code:generic,acceptance_rate,0.4\n"
        "A2_domain_generalization,Code:tuned,acceptance_rate,0.3\nA3_gamma,1,acceptance_rate,0.8\n",
        encoding="utf-8",
    )
    rows = [(row.setting, row.generic, row.tuned) for row in published_rows(tmp_path)]
    assert rows == [("domain generalization, Code", 0.4, 0.3), ("10% of the tuning data", 0.5, 0.6)]
    table.write_text("ablation,seting,quantity,value\n", encoding="utf-8")
    with pytest.raises(ReportError, match="column 'setting': is missing; did you mean 'seting'"):
        published_rows(tmp_path)


def test_published_tables_at_hand() -> None:
    folder = shared_data("osd-token-alpha").parent
    online = [row for row in published_rows(folder) if row.source.startswith("Online")]
    assert online[0].tuned > 4 * online[0].generic  # distilled on its own text, spider
    tuned = [row for row in published_rows(folder) if row.setting.startswith("domain generalization")]
    assert tuned
    assert all(row.tuned < row.generic for row in tuned)  # a negative result
