"""Drafted tokens: rows against slow loops, known odds ratios, held-out scores by hand, survival by hand."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
from builders import felt_traces, run_lengths
from drawn import drawn_runs, given_runs, played
from shared_data import shared_data
from sklearn.metrics import roc_auc_score

from analysis.common.bootstrap import ClusterBootstrap, Estimate
from analysis.common.records import from_json, to_json
from analysis.tokens import (
    HazardCurve,
    TokenFindings,
    TokenRows,
    hazard_curves,
    hold_out,
    kaplan_meier,
    regress,
    study_tokens,
    token_rows,
)
from analysis.tokens.hazard import frailty_trend
from analysis.tokens.heldout import BASE, CONFIDENCE, NEW_PROMPT, SEEN_PROMPT
from calibration.common.errors import ConvergenceWarning, ReportError
from calibration.importers import import_specdecode_bench
from calibration.traces import bundled


def between(estimate: Estimate | None, truth: float) -> bool:
    """Tell whether the interval holds the truth; an interval is required."""
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize("own_state", [False, True])
def test_rows_are_what_the_drafter_felt_in_its_rounds(own_state: bool) -> None:
    """A drafter with a state of its own is read from rollouts, where they were recorded; others from positions."""
    traces, paths = felt_traces(np.random.default_rng(3), stride=4, own_state=own_state)
    rows = token_rows(traces, 5)
    runs: dict[str, list[int]] = {}
    for row in traces.positions.to_pylist():
        runs.setdefault(row["sequence_id"], []).append(row["run_length"])
    expected = []
    for i, name in enumerate(traces.sequences["sequence_id"].to_pylist()):
        for r in played(runs[name], 5):
            for depth in range(1, min(r["accepted"] + 1, r["drafted"], r["left"]) + 1):
                if own_state and r["t"] % 4:
                    continue
                feeling = [path[depth - 1] for path in paths[name, r["t"]]]
                expected.append((i, r["t"] + depth - 1, depth, depth <= r["accepted"], *feeling))
    assert len(rows) == len(expected) > 50
    for i, wanted in enumerate(expected):
        numeric = rows.numeric[i]
        assert (rows.prompt[i], rows.position[i], numeric[3], rows.accepted[i]) == wanted[:4]
        assert numeric[:3] == pytest.approx([*wanted[4:], np.log(wanted[1])], abs=1e-6)


def test_thinning_keeps_the_share_of_every_prompt() -> None:
    rows = made_rows(np.random.default_rng(1), prompts=20, tokens=90)
    thin = rows.thinned(600, np.random.default_rng(2))
    assert np.bincount(thin.prompt).tolist() == [30] * 20
    assert len(np.unique(thin.numeric[:, 0])) == 600


def made_rows(
    rng: np.random.Generator,
    *,
    prompts: int = 60,
    tokens: int = 100,
    effects: tuple[float, float, float, float] = (1.2, -0.4, 0.0, 0.2),
    prompt_sd: float = 0.0,
) -> TokenRows:
    """Tokens whose log-odds of acceptance are linear in standard normal features, with an effect of every prompt."""
    n = prompts * tokens
    numeric = rng.normal(size=(n, 4))
    prompt = np.repeat(np.arange(prompts), tokens)
    odds = numeric @ np.array(effects) + np.repeat(rng.normal(0, prompt_sd, prompts), tokens)
    accepted = rng.random(n) < 1 / (1 + np.exp(-odds))
    numeric[:, 0] = 1 / (1 + np.exp(-numeric[:, 0])) if prompt_sd < 0 else numeric[:, 0]
    drafter = rng.integers(0, 3, n)
    names = tuple(f"p{i}" for i in range(prompts))
    return TokenRows(
        accepted,
        numeric,
        np.tile(np.arange(1, tokens + 1), prompts),
        drafter,
        prompt,
        prompt % 2,
        ("a", "b", "c"),
        names,
        ("x", "y"),
        (),
    )


def test_equations_and_mixed_model_find_known_ratios_in_clustered_tokens() -> None:
    """The mixed model finds the ratios within a prompt; the equations find them drawn towards 1 by prompts' spread.

    exp(b / sqrt(1 + 0.346 s^2)) approximates the population-averaged ratio (Zeger, Liang and Albert 1988).
    """
    effects, spread = (1.2, -0.4, 0.0, 0.2), 0.8
    caught: dict[str, list[bool]] = {"exchangeable": [], "independence": [], "mixed": []}
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rows = made_rows(rng, effects=effects, prompt_sd=spread)
        found = regress(rows, rng)
        sds = rows.numeric.std(axis=0)
        assert found.troubles == ()
        assert found.prompt_sd == pytest.approx(spread, abs=0.25)
        assert found.correlation is not None
        assert 0.05 < found.correlation < 0.2
        for i, name in enumerate(("confidence", "entropy", "ln position", "depth")):
            within = effects[i] * sds[i]
            averaged = within / np.sqrt(1 + 0.346 * spread**2)
            ratio = found.ratio(name)
            caught["exchangeable"].append(between(ratio.exchangeable, np.exp(averaged)))
            caught["independence"].append(between(ratio.independence, np.exp(averaged)))
            caught["mixed"].append(between(ratio.mixed, np.exp(within)))
    # 24 intervals each: at 95% five misses or more have a chance below one in a hundred.
    assert all(sum(hits) >= 20 for hits in caught.values()), caught


def test_the_covariance_sees_the_clusters() -> None:
    """A feature that is one number a prompt: an interval that counted tokens would be several times too narrow."""
    rng = np.random.default_rng(5)
    rows = made_rows(rng, prompt_sd=1.0, effects=(0.0, 0.0, 0.0, 0.0))
    numeric = rows.numeric.copy()
    numeric[:, 1] = rng.normal(size=60)[rows.prompt]
    found = regress(dataclasses.replace(rows, numeric=numeric), rng)
    wide, narrow = found.ratio("entropy").independence, found.ratio("depth").independence
    assert wide is not None
    assert narrow is not None
    assert np.log(wide.high / wide.low) > 3 * np.log(narrow.high / narrow.low)  # type: ignore[operator]


def test_a_fit_that_runs_off_is_told() -> None:
    """Acceptance that a feature separates perfectly has no finite odds ratio."""
    rng = np.random.default_rng(6)
    rows = made_rows(rng, prompts=12, tokens=40)
    parted = dataclasses.replace(rows, accepted=rows.numeric[:, 0] > 0)
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        found = regress(parted, rng)
    assert found.troubles


def test_scores_of_held_out_prompts() -> None:
    """Brier and AUROC of raw confidence by other means; the regression is calibrated and beats the base rate."""
    rng = np.random.default_rng(7)
    rows = made_rows(rng, prompts=40, tokens=120, prompt_sd=1.0, effects=(0.0, 0.0, 0.0, 1.0))
    numeric = rows.numeric.copy()
    numeric[:, 0] = rng.uniform(0.05, 0.95, len(rows))
    accepted = rng.random(len(rows)) < 1 / (
        1 + np.exp(-4 * (numeric[:, 0] - 0.5) - rng.normal(0, 1.5, 40)[rows.prompt])
    )
    rows = dataclasses.replace(rows, numeric=numeric, accepted=accepted)
    found = hold_out(rows, rng, prompt_sd=1.5)
    raw = found.score(CONFIDENCE)
    assert raw.brier.value == pytest.approx(np.mean((numeric[:, 0] - accepted) ** 2), rel=1e-5)
    assert raw.auroc.value == pytest.approx(roc_auc_score(accepted, numeric[:, 0]), abs=2e-3)
    assert sum(b.tokens for b in raw.calibration) == len(rows)
    fitted = found.score(NEW_PROMPT)
    assert fitted.skill.low is not None
    assert fitted.skill.low > 0
    inside = [between(b.observed, b.predicted) for b in fitted.calibration]
    assert sum(inside) >= 8, fitted.calibration
    assert found.score(BASE).skill.value == 0
    seen, new = found.score(SEEN_PROMPT, later=True), found.score(NEW_PROMPT, later=True)
    assert seen.brier.high is not None
    assert new.brier.low is not None
    assert seen.brier.high < new.brier.low


def test_prompts_do_not_leak_between_folds() -> None:
    """Nothing but the prompt's own effect tells acceptance apart: a new prompt is foreseen no better than by rate."""
    rng = np.random.default_rng(8)
    rows = made_rows(rng, prompts=30, tokens=80, prompt_sd=2.0, effects=(0.0, 0.0, 0.0, 0.0))
    found = hold_out(rows, rng, prompt_sd=2.0)
    assert (found.score(NEW_PROMPT).skill.value or 0.0) < 0.02
    assert (found.score(SEEN_PROMPT, later=True).skill.low or 0.0) > 0.2


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ReportError, match="5 prompts at least, got 4"):
        hold_out(made_rows(np.random.default_rng(0), prompts=4), np.random.default_rng(0))


def test_kaplan_meier_by_hand() -> None:
    """Ten rounds of drafts of 3: 4 lose the first token, 2 end after one (the text ends), 1 loses the second, 3 stay.

    At risk 10, 4, 3 -> 6/10 survive depth 1; two of those are censored; 3 of 4 survive depth 2; 3 of 3 depth 3.
    """
    alive = kaplan_meier(np.array([10.0, 4.0, 3.0]), np.array([6.0, 3.0, 3.0]))
    assert alive.tolist() == pytest.approx([0.6, 0.45, 0.45])


def test_hazards_count_censored_drafts_as_at_risk_no_longer() -> None:
    """Rounds of drafts of 2, played one by one: what the end of the text cuts off is no rejection."""
    rng = np.random.default_rng(4)
    runs = [drawn_runs(rng, 40) for _ in range(30)]
    traces = given_runs(runs, domains=["a", "b"] * 15)
    bootstrap = ClusterBootstrap(traces.sequences["domain"].to_pylist(), rng)
    (curve,) = hazard_curves(traces, 2, bootstrap)
    rounds = [r for row in runs for r in played(row, 2)]
    for point in curve.points:
        at_risk = [r for r in rounds if r["accepted"] >= point.depth - 1 and r["left"] >= point.depth]
        lost = sum(r["accepted"] < point.depth for r in at_risk)
        assert point.at_risk == len(at_risk)
        assert point.hazard.value == pytest.approx(lost / len(at_risk), abs=1e-5)
    assert curve.points[1].survival.value == pytest.approx(
        (1 - curve.points[0].hazard.value) * (1 - curve.points[1].hazard.value),  # type: ignore[operator]
        abs=1e-5,
    )


def hazards_of(rates: np.ndarray, tokens: int = 150, seed: int = 0, depths: int = 6) -> HazardCurve:
    """The hazard of a drafter that is right at each position with the rate of its sequence."""
    rng = np.random.default_rng(seed)
    runs = []
    for rate in rates:
        runs.append(run_lengths(rng.random(tokens) < rate).tolist())
    traces = given_runs(runs, domains=["a"] * len(runs))
    (curve,) = hazard_curves(traces, depths, ClusterBootstrap(["a"] * len(runs), rng))
    return curve


def test_a_constant_rate_is_told_constant() -> None:
    """The Wald test keeps its level, roughly: of 10 drafters with one rate, few are called otherwise."""
    found = [hazards_of(np.full(30, 0.6), tokens=100, seed=seed) for seed in range(10)]
    assert sum(curve.verdict == "constant" for curve in found) >= 8
    curve = found[0]
    assert curve.geometric_accepted == pytest.approx(sum(0.6**d for d in range(1, 7)), abs=0.15)


def test_prompts_that_differ_make_the_hazard_fall_and_the_frailty_explains_it() -> None:
    """Within a prompt the rate is constant: the pooled hazard falls, the one with an effect of prompts does not."""
    rates = 1 / (1 + np.exp(-np.random.default_rng(1).normal(0.3, 1.2, 60)))
    curve = hazards_of(rates, tokens=250)
    assert curve.verdict == "falls"
    assert curve.explained == "prompts"
    assert curve.trend is not None
    assert curve.trend.prompt_sd == pytest.approx(1.2, abs=0.3)


def test_the_frailty_trend_has_no_bias_from_streaks() -> None:
    """Effects fitted prompt by prompt would see a rising hazard here (the selection of streaks)."""
    slopes = []
    inside = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rate = 1 / (1 + np.exp(-rng.normal(-1, 0.5, 40)))
        risk, accepted = np.zeros((40, 4)), np.zeros((40, 4))
        risk[:, 0] = 40
        for d in range(4):
            accepted[:, d] = rng.binomial(risk[:, d].astype(int), rate)
            if d < 3:
                risk[:, d + 1] = accepted[:, d]
        found = frailty_trend(risk, accepted)
        assert found is not None
        slopes.append(found[0].value or 0.0)
        inside.append(between(found[0], 0.0))
    assert np.mean(slopes) == pytest.approx(0.0, abs=3 * np.std(slopes) / np.sqrt(30))
    assert sum(inside) >= 26


def test_equal_prompts_have_no_frailty() -> None:
    risk = np.tile([100.0, 50.0, 25.0], (20, 1))
    found = frailty_trend(risk, risk / 2)
    assert found is not None
    assert found[0].value == pytest.approx(0.0, abs=1e-6)
    assert found[1] == pytest.approx(0.0, abs=0.05)


def test_the_bundled_traces_end_to_end() -> None:
    """The sampled ones are studied for the test of the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = study_tokens(bundled("smollm2-135m-cpu-greedy"))
    assert found.requests == 72
    assert "prompt-lookup" not in found.drafters
    assert found.regression is not None
    assert found.held_out is not None
    ratio = found.regression.ratio("confidence")
    for estimate in (ratio.exchangeable, ratio.independence, ratio.mixed):
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.low > 1
    fitted = found.held_out.score(NEW_PROMPT)
    assert fitted.gain.low is not None
    assert fitted.gain.low > 0
    assert found.hazard("prompt-lookup").verdict == "falls"
    assert from_json(TokenFindings, to_json(found), "tokens") == found


def test_without_recorded_confidence_the_hazard_stands_alone() -> None:
    traces = given_runs([drawn_runs(np.random.default_rng(i), 40) for i in range(8)], domains=["a", "b"] * 4)
    found = study_tokens(traces)
    assert (found.regression, found.held_out, found.tokens) == (None, None, 0)
    assert any("recorded confidence and entropy, got none" in note for note in found.notes)
    assert found.hazards[0].points[0].at_risk > 20
    with pytest.raises(ReportError, match="recorded confidence and entropy, got none"):
        token_rows(traces, 4)


@pytest.mark.parametrize(
    ("name", "verdict", "explained"), [("gsm8k", "rises", "neither"), ("instructcoder", "falls", "prompts")]
)
def test_public_eagle_traces_are_not_geometric_in_either_direction(name: str, verdict: str, explained: str) -> None:
    """EAGLE on Llama-3.1-8B: the hazard rises on gsm8k; on instructcoder it falls, because its prompts differ."""
    path = shared_data("specdecode-bench-simulator", "data", "llama3.1-8B", f"combined_{name}.jsonl")
    traces = import_specdecode_bench([path])
    bootstrap = ClusterBootstrap(traces.sequences["domain"].to_pylist(), np.random.default_rng(0), draws=200)
    curve = next(c for c in hazard_curves(traces, 4, bootstrap) if c.drafter == "eagle")
    assert (curve.verdict, curve.explained) == (verdict, explained)
