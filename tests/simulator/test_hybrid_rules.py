"""Rules that choose drafter and length in every round from the text: facts, the plain rule, forecasts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hybrid_made import LOOKUP, MODEL, hybrid_scenario, hybrid_traces
from scenarios import LINEAR

from calibration.common.errors import ReplayError
from calibration.proposers.lookup import lookup_runs
from calibration.traces import TraceSet, bundled, make_table
from simulator import Scenario, simulate
from simulator.drafter_routing.forecast import deal, learn_forecasts
from simulator.playback.replay import select_sequences
from simulator.playback.survival import (
    FACTS,
    RECENT_PRIOR,
    fit_effects,
    fit_hazard,
    read_text,
    recent_acceptance,
    text_facts,
)


def longest_match(text: Sequence[int]) -> int:
    """The longest suffix that occurred before, by trying all."""
    for length in range(len(text) - 1, 0, -1):
        suffix = list(text[-length:])
        if any(list(text[i : i + length]) == suffix for i in range(len(text) - length)):
            return length
    return 0


def test_matches_are_the_longest_suffixes_that_occurred_before() -> None:
    rng = np.random.default_rng(0)
    prompt, output = rng.integers(0, 4, 12).tolist(), rng.integers(0, 4, 25).tolist()
    match, facts, source = read_text(prompt, output)
    text = prompt + output
    for t in np.flatnonzero(match).tolist():
        end, at, long = len(prompt) + t, int(source[t]), int(match[t])
        assert text[at - long : at] == text[end - long : end]
        assert all(text[i - long : i] != text[end - long : end] for i in range(at + 1, end))
    assert match.tolist() == [longest_match(prompt + output[:t]) for t in range(len(output))]
    assert facts.shape == (len(output), len(FACTS))
    assert facts[:, FACTS.index("match_of_3")].tolist() == (match >= 3).astype(float).tolist()


def test_facts_never_see_the_future() -> None:
    rng = np.random.default_rng(1)
    prompt, output = rng.integers(0, 5, 20).tolist(), rng.integers(0, 5, 40).tolist()
    match, facts, _ = read_text(prompt, output)
    for t in (1, 7, 25):
        other = output[:t] + rng.integers(5, 9, 40 - t).tolist()
        again = read_text(prompt, other)
        assert again[0][: t + 1].tolist() == match[: t + 1].tolist()
        assert again[1][: t + 1].tolist() == facts[: t + 1].tolist()


def test_hits_and_streak_follow_a_copied_text() -> None:
    text = list(range(30))
    match, facts, _ = read_text(text, text)
    assert match[1:].tolist() == list(range(1, 30)), "every token goes on with the copy"
    streak = np.expm1(facts[:, FACTS.index("streak")])
    assert streak[2:] == pytest.approx(np.arange(1, 29))
    assert (np.diff(facts[2:, FACTS.index("hits")]) > 0).all()


def test_a_hazard_gives_back_the_survival_it_was_drawn_from() -> None:
    rng = np.random.default_rng(2)
    kind = rng.integers(0, 2, 20_000)
    run = np.where(kind == 1, rng.geometric(0.1, 20_000), rng.geometric(0.6, 20_000)) - 1
    x = np.stack([np.ones(20_000), kind.astype(float)], axis=1)
    curve = fit_hazard(x, run, np.full(20_000, 99), 10).curve(np.array([[1.0, 0.0], [1.0, 1.0]]))
    depth = np.arange(1, 11)
    assert curve[0] == pytest.approx(0.4**depth, abs=0.015)
    assert curve[1] == pytest.approx(0.9**depth, abs=0.015)


def test_a_cut_proposal_says_nothing_about_the_depths_behind_it() -> None:
    rng = np.random.default_rng(3)
    run = rng.geometric(0.3, 30_000) - 1
    proposed = rng.integers(0, 6, 30_000)
    x = np.ones((30_000, 1))
    curve = fit_hazard(x, np.minimum(run, proposed), proposed, 5).curve(np.ones((1, 1)))
    assert curve[0] == pytest.approx(0.7 ** np.arange(1, 6), abs=0.02)


def test_tokens_at_which_copies_break_are_learned() -> None:
    """Copies break at token 3 and nowhere else; the effects say so, and nothing of tokens never seen."""
    rng = np.random.default_rng(4)
    path = rng.integers(0, 6, (4000, 6))
    breaks = path[:, 1:] == 3
    run = np.where(breaks.any(axis=1), np.argmax(breaks, axis=1), 5)
    x, proposed = np.ones((4000, 1)), np.full(4000, 5)
    hazard = fit_hazard(x, run, proposed, 5)
    effects = fit_effects(hazard, x, path, run, proposed, tokens=8)
    assert effects.own[3] < -1.5
    assert effects.own[[0, 1, 2, 4, 5]].min() > 0.3
    assert effects.own[[6, 7, 8]].tolist() == [0, 0, 0]
    assert np.abs(effects.before[:6]).max() < 0.5
    assert effects.of(path[:1]).shape == (1, 5)


def test_a_path_is_what_followed_the_latest_match() -> None:
    traces = hybrid_traces(sequences=3)
    sequences = select_sequences(traces, drafter=("model", "lookup"))
    facts = text_facts(traces, sequences, "a test")
    rows = traces.sequences.to_pylist()
    where = [(i, t) for i in range(3) for t in range(150)]
    paths = facts.path(np.arange(450), 4)
    for (i, t), path in zip(where, paths.tolist(), strict=True):
        text = rows[i]["prompt_token_ids"] + rows[i]["output_token_ids"][:t]
        assert path[0] == text[-1]
        again = [at for at in range(1, len(text)) if text[at - 1] == text[-1]]
        assert (path[1] == -1) == (not again)
        if again:
            assert path[1] in [text[at] for at in again]


def test_recent_acceptance_starts_from_its_prior() -> None:
    hits, seen = RECENT_PRIOR
    assert recent_acceptance(np.zeros(1), np.zeros(1))[0] == pytest.approx(np.log(hits / (seen - hits)))
    assert recent_acceptance(np.array([9.0]), np.array([10.0]))[0] > recent_acceptance(np.zeros(1), np.zeros(1))[0]


def test_the_plain_rule_copies_where_three_tokens_match() -> None:
    traces = hybrid_traces(sequences=4)
    prompt, output = traces.sequences["prompt_token_ids"].to_pylist()[0], None
    output = traces.sequences["output_token_ids"].to_pylist()[0]
    result = simulate(hybrid_scenario({"policy": "context_match", "lookup": "lookup"}, batch=1, requests=1), traces)
    match, _, _ = read_text(prompt, output)
    runs = {
        "lookup": lookup_runs(prompt, output, **LOOKUP)[0],
        "model": [min(MODEL, len(output) - t) for t in range(len(output))],
    }
    t, rounds = 1, {"lookup": 0, "model": 0}
    while t < len(output):
        who, tokens = ("lookup", 20) if match[t] >= 3 else ("model", 7)
        rounds[who] += 1
        t += min(runs[who][t], tokens, len(output) - t) + 1
    told = result.summary["drafter_routing"]["drafters"]
    assert {name: told[name]["rounds"] for name in rounds} == rounds
    assert min(rounds.values()) > 0


def test_tiers_hold_from_their_batch_size_on() -> None:
    traces = hybrid_traces(sequences=6)
    tiers = {"1": {"model_tokens": 5}, "3": {"min_match": 999, "model_tokens": 0}}
    rule = {"policy": "context_match", "lookup": "lookup", "tiers": tiers}
    alone = simulate(hybrid_scenario(rule, batch=2), traces).summary
    full = simulate(hybrid_scenario(rule, batch=6, requests=6), traces)
    assert alone["drafter_routing"]["drafters"]["model"]["drafted_tokens"] > 0
    crowded = full.iterations.to_pandas()
    assert (crowded["drafted_tokens"][crowded["active"] >= 3] == 0).all()


def test_the_stopping_policy_caps_every_draft() -> None:
    traces = hybrid_traces(sequences=4)
    for rule in ({"policy": "context_match", "lookup": "lookup"}, {"policy": "forecast", "folds": 2}):
        table = simulate(hybrid_scenario(rule, batch=1, longest=2), traces).iterations
        assert int(np.max(table["drafted_tokens"].to_numpy())) <= 2


def test_a_drafter_that_drafts_nothing_is_not_paid() -> None:
    traces = hybrid_traces(sequences=3)
    rule = {"policy": "context_match", "lookup": "lookup", "tiers": {"1": {"lookup_tokens": 0, "model_tokens": 0}}}
    idle = simulate(hybrid_scenario(rule, batch=1), traces).summary
    assert idle["total_output_tokens"] == sum(traces.sequences["output_tokens"].to_pylist())
    table = simulate(hybrid_scenario(rule, batch=1), traces).iterations
    assert (table["draft_s"].to_numpy() == 0).all()


def test_forecasts_choose_the_better_drafter_where_the_text_tells_it() -> None:
    traces = hybrid_traces(sequences=16)
    results = {
        name: simulate(hybrid_scenario(rule, batch=1), traces).summary["output_throughput"]
        for name, rule in {
            "forecast": {"policy": "forecast"},
            "model": {"policy": "static", "drafter": "model"},
            "lookup": {"policy": "static", "drafter": "lookup"},
        }.items()
    }
    assert results["forecast"] > 1.1 * max(results["model"], results["lookup"])


def test_forecasts_give_up_drafting_where_it_does_not_pay() -> None:
    traces = hybrid_traces(sequences=8, copying=0.0, model=0)
    told = simulate(hybrid_scenario({"policy": "forecast", "folds": 2}, batch=2), traces).summary
    drafted = sum(part["drafted_tokens"] for part in told["drafter_routing"]["drafters"].values())
    rounds = sum(part["rounds"] for part in told["drafter_routing"]["drafters"].values())
    assert drafted < 0.2 * rounds, "nothing is ever accepted"


def test_a_fixed_price_is_not_paid_for_one_slot_of_many() -> None:
    """A drafter of 50 ms a round is worth it for a whole batch, not for the few slots that do not copy."""
    traces = hybrid_traces(sequences=16)
    dear = {"kind": "linear", "base_s": 0.05, "charged": "per_round"}
    result = simulate(hybrid_scenario({"policy": "forecast"}, batch=8, model_price=dear), traces)
    assert (result.iterations["draft_s"].to_numpy() > 0.05).mean() < 0.2
    lookup = {"policy": "static", "drafter": "lookup"}
    alone = simulate(hybrid_scenario(lookup, batch=8, model_price=dear), traces)
    assert result.summary["output_throughput"] > 0.99 * alone.summary["output_throughput"]


def test_equal_prompts_are_never_learned_from() -> None:
    traces = hybrid_traces(sequences=8, twins=True)
    sequences = select_sequences(traces, drafter=("model", "lookup"))
    fold, number = deal(traces, sequences, 3, seed=0)
    assert number == 3
    assert fold[:4].tolist() == fold[4:].tolist()


def test_a_request_does_not_change_its_own_forecast() -> None:
    traces = hybrid_traces(sequences=6)
    sequences = select_sequences(traces, drafter=("model", "lookup"))
    learned = learn_forecasts(traces, ("model", "lookup"), sequences, longest=5, folds=2, learn_from=None, seed=0)
    changed = hybrid_traces(sequences=6, other_model={0: 0})
    again = learn_forecasts(changed, ("model", "lookup"), sequences, longest=5, folds=2, learn_from=None, seed=0)
    fold = int(learned.model[0])
    assert again.coefficients[:, fold].tolist() == learned.coefficients[:, fold].tolist()
    assert again.own[:, fold].tolist() == learned.own[:, fold].tolist()
    assert again.before[:, fold].tolist() == learned.before[:, fold].tolist()
    assert again.coefficients[0, 1 - fold].tolist() != learned.coefficients[0, 1 - fold].tolist()


def test_forecasts_can_be_learned_from_other_domains_alone() -> None:
    traces = hybrid_traces(sequences=12, domains=("code", "chat"))
    rule = {"policy": "forecast", "folds": 2, "learn_from": ["code"]}
    result = simulate(hybrid_scenario(rule, batch=1, traces={"domains": ["chat"]}), traces)
    assert result.summary["completed"] == 6
    sequences = select_sequences(traces, domains=["chat"], drafter=("model", "lookup"))
    learned = learn_forecasts(traces, ("model", "lookup"), sequences, longest=5, folds=2, learn_from=["code"], seed=0)
    assert set(learned.model.tolist()) == {2}


def test_same_seed_same_bytes() -> None:
    traces = hybrid_traces(sequences=6)
    first, second = (
        simulate(hybrid_scenario({"policy": "forecast", "folds": 2}, batch=3), hybrid_traces(sequences=6))
        for _ in range(2)
    )
    assert first.iterations.equals(second.iterations)
    assert traces.sequences.num_rows == 6


def test_what_is_missing_is_said() -> None:
    traces = hybrid_traces(sequences=4)
    ids = traces.sequences.drop_columns(["output_token_ids"])
    columns = {name: ids[name].to_pylist() for name in ids.column_names}
    bare = TraceSet.build(
        traces.manifest, {"sequences": make_table("sequences", columns), "positions": traces.positions}
    )
    with pytest.raises(ReplayError, match="output_token_ids"):
        simulate(hybrid_scenario({"policy": "context_match", "lookup": "lookup"}), bare)
    with pytest.raises(ReplayError, match="longest draft"):
        simulate(hybrid_scenario({"policy": "forecast"}, stopping={"policy": "oracle"}), traces)
    with pytest.raises(ValueError, match="must be one of the drafters"):
        hybrid_scenario({"policy": "context_match", "lookup": "lookups"})
    with pytest.raises(ValueError, match="two drafters"):
        hybrid_scenario({"policy": "context_match", "lookup": "lookup", "drafters": ["lookup"]})
    with pytest.raises(ValueError, match="learned"):
        hybrid_scenario({"policy": "forecast"}, stopping={"policy": "learned"})


def test_bundled_traces_are_served_by_forecast() -> None:
    """Prompt lookup and an early exit, recorded together: a run ends, and every output token is emitted once."""
    traces = bundled("smollm2-135m-cpu-greedy")
    data = {
        "traces": {"domains": [traces.sequences["domain"].to_pylist()[0]]},
        "routing": {"drafter": {"policy": "forecast", "drafters": ["exit-28", "prompt-lookup"]}},
        "stopping": {"policy": "fixed", "draft_tokens": 8},
        "engine": {"max_num_seqs": 8},
        "workload": {"kind": "closed", "concurrency": 8},
        "costs": {"overhead_s": 0.001, "verifier": LINEAR, "drafter": {**LINEAR, "base_s": 0.002}},
    }
    result = simulate(Scenario.model_validate(data), traces)
    assert result.summary["total_output_tokens"] == sum(result.requests["output_tokens"].to_pylist())
    assert result.summary["drafter_routing"]["drafters"]["prompt-lookup"]["accepted_tokens"] > 0
