"""The study of a cascade on made-up tables whose truth is known."""

from __future__ import annotations

import csv
import dataclasses
import io
from itertools import product

import numpy as np
import pytest
from cascade_made import graded_by_difficulty, table_of, two_valued

from analysis.cascade import CascadeFindings, QualityTable, bundled_tables, read_quality_table, study_cascade
from analysis.cascade.curves import choices, evaluate, outcome, sets_needed
from analysis.cascade.findings import Headline
from analysis.cascade.predictor import crossfit, features, fit
from analysis.cascade.reading import frontier_csv
from analysis.cascade.rules import CascadeRule, Choice, fit_rule, information_sets, learn
from analysis.cascade.scores import Together
from analysis.cascade.stopping import sequential_nodes, solve
from analysis.cascade.study import find_headline
from analysis.common.bootstrap import ClusterBootstrap
from analysis.common.records import from_json, to_json
from calibration.common.errors import ConvergenceWarning, ReplayError

LAMBDAS = (2.0, 10.0, 20.0, 60.0)


@pytest.fixture(scope="module")
def table() -> QualityTable:
    return graded_by_difficulty(np.random.default_rng(3), 500)


@pytest.fixture(scope="module")
def findings(table: QualityTable) -> CascadeFindings:
    return study_cascade(table, LAMBDAS, draws=300)


def value(found: CascadeFindings, policy: str, lam: float, what: str) -> float:
    curve = found.policy(policy)
    assert curve is not None
    point = next(p for p in curve.points if p.lam == lam)
    number = getattr(point, what).value
    assert number is not None
    return float(number)


def test_stages_are_shared_out_by_lambda(findings: CascadeFindings) -> None:
    """The cheapest stage answers all at a low lambda, and each stage at least a twentieth at some lambda."""
    assert not findings.degenerate
    curve = findings.policy("sequential")
    assert curve is not None
    shares = np.array([[s.value or 0.0 for s in point.answered] for point in curve.points])
    assert shares.sum(axis=1) == pytest.approx(np.ones(len(LAMBDAS)), abs=1e-5)
    assert shares[0, 0] == 1.0
    assert (shares.max(axis=0) >= 0.05).all()
    assert ((shares >= 0.05).sum(axis=1) >= 2).any()
    assert (np.diff(shares[:, 0]) <= 0).all()


def test_learned_rules_beat_single_stages_thresholds_and_mixing_here(findings: CascadeFindings) -> None:
    for policy in ("sequential", "cascade-routing"):
        curve = findings.policy(policy)
        assert curve is not None
        point = next(p for p in curve.points if p.lam == 60.0)
        assert (point.gain.low or 0.0) > 0
        assert (point.over_mixing.low or 0.0) > 0
        for lam in LAMBDAS:
            for threshold in ("score-threshold", "confidence-threshold"):
                slack = 0.02 * lam  # a threshold tuned on the same folds may win by chance, not by this
                assert value(findings, policy, lam, "utility") > value(findings, threshold, lam, "utility") - slack
    assert findings.headline.policy in ("sequential", "cascade-routing")
    assert findings.headline.pays


def test_bounds_that_hold_together_are_wider_and_name_what_may_be_best(findings: CascadeFindings) -> None:
    for curve in findings.policies:
        oracle = curve.policy.startswith("oracle")
        pairs = [(p.gain, p.gain_together) for p in curve.points]
        for value_, together in [(curve.mean_gain, curve.mean_gain_together), *pairs]:
            assert together.value == value_.value
            assert (together.low is None) == oracle
            if not oracle and value_.low != value_.high:
                assert together.low < value_.low
    assert [one.lam for one in findings.best] == list(LAMBDAS)
    for one in findings.best:
        values = {c.policy: value(findings, c.policy, one.lam, "utility") for c in findings.policies}
        top = max((p for p in values if not p.startswith("oracle")), key=values.__getitem__)
        assert top in one.policies or one.stages
        assert not set(one.policies) & {"oracle", "oracle-sequential"}
    head = findings.headline
    if head.saving is not None:
        assert head.saving.low < head.saving.value < head.saving.high
        assert head.saving_quality.value >= -1e-6


def test_nothing_beats_the_oracle(findings: CascadeFindings) -> None:
    for curve, lam in product(findings.policies, LAMBDAS):
        assert value(findings, "oracle", lam, "utility") >= value(findings, curve.policy, lam, "utility") - 1e-4
        if curve.policy in ("sequential", "score-threshold", "confidence-threshold"):
            top = value(findings, "oracle-sequential", lam, "utility")
            assert top >= value(findings, curve.policy, lam, "utility") - 1e-4


def test_numbers_are_looked_up_in_the_table() -> None:
    """Quality and cost of the sequential rule, item by item, from what it did."""
    table = graded_by_difficulty(np.random.default_rng(3), 150, (1.0, 4.0))
    folds = crossfit(table, sets_needed(2), 0, known_domain=False)
    done = choices(table, folds, (20.0,))["sequential"][0]
    quality, cost = outcome(table, done)
    for item in range(0, 150, 10):
        last = int(done.answer[item])
        assert done.ran[item].tolist() == [k <= last for k in range(2)]
        assert quality[item] == table.correct[item, last]
        assert cost[item] == pytest.approx(sum((1.0, 4.0)[: last + 1]))
    found = study_cascade(table, (20.0,), draws=100)
    assert value(found, "sequential", 20.0, "utility") == pytest.approx((20 * quality - cost).mean(), rel=1e-4)


def test_the_learned_rule_comes_near_the_optimum_of_the_known_law() -> None:
    """Discrete signals: the exact optimum from the law against the utility found out of fold."""
    table, chances = two_valued(np.random.default_rng(0), 900)
    folds = crossfit(table, sets_needed(3), 0, known_domain=False)
    lambdas = (4.0, 10.0, 25.0)
    done = choices(table, folds, lambdas)["sequential"]
    states = {k: list(product((0, 1), repeat=k)) for k in range(4)}
    reach = {h: chances[h].sum() for k in states for h in states[k]}
    qualities = []
    for k in (1, 2, 3):
        where = [(*h, *[slice(None)] * (3 - k), *[slice(None)] * (k - 1), 1) for h in states[k]]
        qualities.append(np.array([chances[w].sum() / reach[h] for w, h in zip(where, states[k], strict=True)]))
    steps = [
        np.array([[reach[t] / reach[h] if t[:-1] == h else 0.0 for t in states[k + 1]] for h in states[k]])
        for k in (0, 1, 2)
    ]
    nodes = sequential_nodes((1.0, 3.0, 9.0), qualities, steps)
    for lam, choice in zip(lambdas, done, strict=True):
        exact = solve(nodes, lam).value[()][0]
        quality, cost = outcome(table, choice)
        utility = lam * quality - cost
        error = utility.std() / 30
        assert abs(utility.mean() - exact) < 3 * error
        blind = max(lam * table.correct[:, k].mean() - sum((1, 3, 9)[: k + 1]) for k in range(3))
        if exact - blind > 4 * error:
            assert utility.mean() > blind


def test_signals_without_content_bring_nothing_and_are_said_to() -> None:
    rng = np.random.default_rng(1)
    correct = rng.random((200, 2)) < [0.5, 0.6]
    table = table_of(correct, (1.0, 4.0), {"confidence": rng.random((200, 2))})
    with pytest.warns(ConvergenceWarning, match="no lambda of the grid lets two stages answer 5%"):
        found = study_cascade(table, (3.0, 10.0), draws=100)
    assert found.degenerate
    assert (found.headline.mean_gain.value or 0.0) <= 0.005
    after = {(s.stage, s.after): s for s in found.scores}
    assert (after["stage-0", 1].skill.high or 0.0) < 0.1
    assert (after["stage-0", 1].auroc.low or 0.0) < 0.5


def test_predictions_are_scored_before_and_after_each_stage(findings: CascadeFindings) -> None:
    scores = {(s.stage, s.after): s for s in findings.scores}
    assert set(scores) == {
        *(("stage-0", k) for k in (0, 1)),
        *(("stage-1", k) for k in (0, 1, 2)),
        *(("stage-2", k) for k in (0, 1, 2, 3)),
    }
    before, own = scores["stage-0", 0], scores["stage-0", 1]
    assert (own.auroc.low or 0.0) > (before.auroc.high or 1.0)
    assert (own.brier.high or 1.0) < (own.brier_base.low or 0.0)
    for after in range(4):
        assert sum(form.folds for form in findings.forms if form.after == after) == findings.folds == 5


def test_what_is_known_of_the_domain_helps_where_it_decides() -> None:
    """Easy domain: the small stage suffices; hard domain: it never does. Route-once finds both, if told."""
    hard = np.arange(200) % 2 == 1
    correct = np.stack([~hard, np.ones(200, dtype=bool)], axis=1)
    table = table_of(correct, (1.0, 5.0))
    told = study_cascade(table, (10.0,), known_domain=True, draws=100)
    assert value(told, "route-once", 10.0, "utility") == pytest.approx(10 - 3, abs=1e-6)
    assert value(told, "route-once", 10.0, "gap_closed") == pytest.approx(1.0)


def test_the_default_grid_spans_from_never_to_past_the_last_switch() -> None:
    found = study_cascade(graded_by_difficulty(np.random.default_rng(3), 150, (1.0, 4.0)), draws=50)
    assert len(found.lambdas) == 25
    assert found.lambdas[0] < 1.0
    assert found.lambdas[-1] > found.switches_sequential[-1].from_lambda
    cheap = next(r for r in found.ranges if r.policy == "sequential" and r.stage == "stage-0")
    assert cheap.from_lambda == found.lambdas[0]
    assert cheap.most_share == 1.0
    last = next(r for r in found.ranges if r.policy == "sequential" and r.stage == "stage-1")
    assert last.from_lambda is not None
    assert last.from_lambda > 4
    assert last.edge


def test_findings_travel_as_json_and_repeat() -> None:
    table = graded_by_difficulty(np.random.default_rng(4), 60, (1.0, 4.0))
    found = study_cascade(table, LAMBDAS, draws=50)
    assert from_json(CascadeFindings, to_json(found), "here") == found
    assert to_json(study_cascade(table, LAMBDAS, draws=50)) == to_json(found)


def test_the_frontier_as_csv(findings: CascadeFindings) -> None:
    rows = list(csv.DictReader(io.StringIO(frontier_csv(findings))))
    assert len(rows) == 3 + len(LAMBDAS) * len(findings.policies)
    one = next(r for r in rows if r["policy"] == "sequential" and float(r["lambda"]) == 20.0)
    assert float(one["quality_low"]) < float(one["quality"]) < float(one["quality_high"])
    assert float(one["utility"]) == pytest.approx(20 * float(one["quality"]) - float(one["cost"]), abs=1e-3)
    always = next(r for r in rows if r["policy"] == "always stage-2")
    assert always["lambda"] == ""
    assert float(always["cost"]) == 16.0


def test_a_written_rule_does_what_the_fitted_one_does(table: QualityTable) -> None:
    rule = from_json(CascadeRule, to_json(fit_rule(table)), "policy.json")
    sets = information_sets(3, "sequential")
    columns = {ran: features(table, ran, known_domain=False) for ran in sets}
    fitted = fit(table, columns, np.arange(500), 0)
    learned = learn(fitted.posteriors, table, "sequential")
    posteriors = {ran: fitted.predictors[ran](x) for ran, (_, x) in columns.items()}
    for lam in (8.0, 30.0):
        expected = learned.choose(posteriors, lam).answer
        for item in range(0, 500, 7):
            seen = {"item_prompt_tokens": float(table.item_features["item_prompt_tokens"][item])}
            stage = 0
            while True:
                name = table.stages[stage]
                seen[f"{name}.confidence"] = float(table.signals["confidence"][item, stage])
                if not rule.runs_on(name, seen, lam):
                    break
                stage += 1
            assert stage == expected[item], (item, lam)
    with pytest.raises(ReplayError, match="stage 'x': must be one of stage-0, stage-1"):
        rule.posterior("x", {})


def test_what_cannot_be_studied_is_refused(table: QualityTable) -> None:
    with pytest.raises(ReplayError, match="needs 60 items or more"):
        study_cascade(graded_by_difficulty(np.random.default_rng(0), 40))
    with pytest.raises(ReplayError, match="lambda: must be above 0 and finite, got 0"):
        study_cascade(table, (0.0, 1.0))


@pytest.mark.parametrize("name", bundled_tables())
def test_bundled_tables_let_stages_share_the_work(name: str) -> None:
    """Two stages of each table, a third of its items; exits of one model go on from each other."""
    table = read_quality_table(name, continued=True)
    some = table.only((table.stages[0], table.stages[-1])).subset(np.arange(0, len(table.items), 3))
    assert not study_cascade(some, draws=50).degenerate


def test_stages_that_go_on_from_each_other_make_running_in_order_cheap() -> None:
    """The same answers: continued, a sequential oracle is an oracle that routes, and stops cost no more."""
    table = graded_by_difficulty(np.random.default_rng(3), 100, (1.0, 4.0))
    apart = study_cascade(table, (10.0,), draws=50)
    joined = study_cascade(dataclasses.replace(table, continued=True), (10.0,), draws=50)
    assert value(joined, "oracle-sequential", 10.0, "utility") == value(joined, "oracle", 10.0, "utility")
    assert value(joined, "sequential", 10.0, "utility") > value(apart, "sequential", 10.0, "utility")
    assert joined.switches_sequential == joined.switches_once


def at_random(rng: np.random.Generator, items: int, stages: int, lambdas: int) -> list[Choice]:
    """A policy that lets chance choose the stage of each item, anew at each lambda."""
    answers = [rng.integers(stages, size=items) for _ in range(lambdas)]
    return [Choice(np.arange(stages) == answer[:, None], answer) for answer in answers]


def judged(rng: np.random.Generator, table: QualityTable, better: dict[str, np.ndarray]) -> tuple[Headline, Together]:
    """Headline and bounds of five policies that route at random; `better`: the stages that some choose instead."""
    grid, items = (2.0, 4.0, 8.0, 16.0), len(table.items)
    names = ("sequential", "cascade-routing", "route-once", "score-threshold", "confidence-threshold")
    done = {name: at_random(rng, items, len(table.stages), len(grid)) for name in names}
    for name, answer in better.items():
        done[name] = [Choice(np.arange(len(table.stages)) == answer[:, None], answer)] * len(grid)
    bootstrap = ClusterBootstrap(table.domains, rng, draws=300)
    together = Together(table, done, grid, bootstrap)
    each = together.gains(), together.mean_gains()
    curves = [evaluate(table, name, done[name], grid, bootstrap, *each) for name in names]
    return find_headline(table, curves, done, bootstrap), together


def test_where_no_policy_is_better_at_most_one_study_in_twenty_says_so() -> None:
    """Stages of one cost and one quality, policies that route at random: all are equal, whatever lambda."""
    rng, repeats = np.random.default_rng(31), 150
    pays = anywhere = left_out = 0
    for _ in range(repeats):
        table = table_of(rng.random((80, 3)) < 0.6, (1.0, 1.0, 1.0))
        head, together = judged(rng, table, {})
        pays += head.pays
        gains = together.gains()
        anywhere += any(low > 0 for low, _ in gains.values())
        sets = together.best_at()
        left_out += any(len(one.policies) < 5 or len(one.stages) < 3 for one in sets)
    assert pays / repeats <= 0.05
    assert anywhere / repeats <= 0.05
    assert left_out / repeats <= 0.05 + 0.054  # nominal 5%; 3 binomial standard errors


def test_at_the_boundary_where_one_stage_is_best_and_policies_equal_it() -> None:
    """One stage is far above the others but on half of the items; there policies choose at random, else take it.

    Each policy truly equals the best stage, and no other comes near: nothing makes the bounds more careful.
    """
    rng, repeats, pays, anywhere = np.random.default_rng(33), 200, 0, 0
    names = ("sequential", "cascade-routing", "route-once", "score-threshold", "confidence-threshold")
    for _ in range(repeats):
        alike = np.arange(120) % 2 == 0
        right = np.where(alike[:, None], 0.6, [0.6, 0.05, 0.05])
        table = table_of(rng.random((120, 3)) < right, (1.0, 1.0, 1.0), domains=("a",))
        answers = {name: np.where(alike, rng.integers(3, size=120), 0) for name in names}
        head, together = judged(rng, table, answers)
        pays += head.pays
        anywhere += any(low > 0 for low, _ in together.gains().values())
    assert 0 < pays / repeats <= 0.05
    assert anywhere / repeats <= 0.05


def test_a_policy_that_knows_some_answers_is_found_to_pay() -> None:
    """Power: right on a tenth more of 200 items than any stage, 2.7 standard errors, is shown in 8 of 10 studies."""
    rng, repeats, found, named = np.random.default_rng(32), 40, 0, 0
    for _ in range(repeats):
        correct = rng.random((200, 3)) < 0.6
        table = table_of(correct, (1.0, 1.0, 1.0))
        knows = np.where(rng.random(200) < 0.55, correct.argmax(axis=1), rng.integers(3, size=200))
        head, together = judged(rng, table, {"sequential": knows})
        found += head.pays
        named += all("sequential" in one.policies for one in together.best_at())
    assert found / repeats >= 0.8
    assert named / repeats >= 0.95
