"""Closed batches in exact form, and the evaluation of hybrid policies."""

from __future__ import annotations

import numpy as np
import pytest
from hybrid_made import hybrid_traces
from shared_data import shared_data

from analysis.common.records import from_json, to_json
from calibration.common.errors import CalibrationError, TraceError
from calibration.proposers.suffix import SuffixSettings
from calibration.traces.manifest import CostConstants, FractionOfVerify, LinearCost
from studies.hybrid.closed import ClosedBatches, as_one
from studies.hybrid.evaluate import LONGEST, PER_ROUND, Roles, evaluate_hybrid, per_step, simulated_rates
from studies.hybrid.findings import HybridFindings
from studies.hybrid.material import complete, halves, of_domains, paired, with_suffix
from studies.hybrid.reference import reference
from studies.hybrid.rule import TunedRule

MODEL_DRAFT = LinearCost(base_s=2e-3, per_token_s=1e-6, per_context_token_s=2e-9, charged="per_round")
PRICES = CostConstants(
    source="test",
    verifier=LinearCost(base_s=6e-3, per_token_s=2e-5, per_context_token_s=4e-8),
    drafters={
        "model": MODEL_DRAFT,
        "lookup": FractionOfVerify(fraction=0.006),
        "suffix": FractionOfVerify(fraction=0.006),
    },
    overhead_s=1e-3,
)
ROLES = Roles(model="model", lookup="lookup")


@pytest.mark.parametrize("drafter", ["model", "lookup"])
@pytest.mark.parametrize("batch", [1, 3])
def test_closed_batches_are_what_the_simulator_gives(drafter: str, batch: int) -> None:
    traces = hybrid_traces(sequences=3)
    closed = ClosedBatches(traces, ("model", "lookup"))
    rounds = closed.play(("model", "lookup").index(drafter), 4)
    rule = {"policy": "static", "drafters": ["model", "lookup"], "drafter": drafter}
    simulated = simulated_rates(traces, rule, PRICES, 4, batch=batch)
    assert closed.rates(rounds, PRICES, batch) == pytest.approx(simulated, rel=1e-9)


def test_steps_are_priced_as_the_simulator_prices_them() -> None:
    traces, prices = hybrid_traces(sequences=2), per_step(PRICES, "model", 3)
    closed = ClosedBatches(traces, ("model", "lookup"))
    rule = {"policy": "static", "drafters": ["model", "lookup"], "drafter": "model"}
    simulated = simulated_rates(traces, rule, prices, 5, batch=2)
    assert closed.rates(closed.play(0, 5), prices, 2) == pytest.approx(simulated, rel=1e-9)


@pytest.mark.parametrize("policy", ["context_match", "forecast"])
def test_copies_are_one_request_at_their_prices(policy: str) -> None:
    """What B copies do in step, one request does alone at as_one's prices: drafter by drafter, token by token."""
    traces = hybrid_traces(sequences=4)
    rule = {"policy": policy, "drafters": ["model", "lookup"]} | (
        {"lookup": "lookup"} if policy != "forecast" else {}
    )
    copies = simulated_rates(traces, rule, PRICES, LONGEST, batch=4)
    assert simulated_rates(traces, rule, as_one(PRICES, 4), LONGEST) == pytest.approx(copies, rel=1e-9)


def test_the_oracle_is_faster_than_every_fixed_draft() -> None:
    closed = ClosedBatches(hybrid_traces(sequences=6), ("model", "lookup"))
    for batch in (1, 32):
        oracle = closed.rates(closed.oracle(PRICES, batch), PRICES, batch).mean()
        fixed = [closed.rates(closed.play(d, k), PRICES, batch).mean() for d in (0, 1) for k in (1, 2, 4, 20)]
        assert oracle > max(fixed)


def test_spreading_a_price_over_its_steps_leaves_that_length_as_dear() -> None:
    closed = ClosedBatches(hybrid_traces(sequences=2), ("model", "lookup"))
    seven = closed.play(0, 7)
    spread = closed.rates(seven, per_step(PRICES, "model", 7), 1)
    assert spread == pytest.approx(closed.rates(seven, PRICES, 1), rel=2e-3)
    short = closed.play(0, 2)
    assert (closed.rates(short, per_step(PRICES, "model", 7), 1) > closed.rates(short, PRICES, 1)).all()
    with pytest.raises(CalibrationError, match="per round"):
        per_step(PRICES, "lookup", 3)


def test_the_suffix_lookup_copies_the_latest_match() -> None:
    traces = with_suffix(hybrid_traces(sequences=2), SuffixSettings(max_draft_tokens=6))
    table = traces.positions.to_pandas()
    mine = table[(table["drafter"] == "suffix") & (table["sequence_id"] == "request-0")]
    rows = traces.sequences.to_pylist()[0]
    text, prompt = rows["prompt_token_ids"] + rows["output_token_ids"], len(rows["prompt_token_ids"])
    for t, run, proposed in zip(mine["position"], mine["run_length"], mine["proposal_length"], strict=True):
        end = prompt + t
        matched = [i for i in range(1, end) if text[i - 1] == text[end - 1]]
        assert (proposed > 0) == bool(matched)
        assert run <= proposed <= 6
    assert mine["run_length"].max() == 6


def test_paired_lists_stand_side_by_side_and_end_with_the_shorter() -> None:
    traces = hybrid_traces(sequences=2, length=40)
    assert paired(traces, "model", "lookup").positions.num_rows == traces.positions.num_rows
    with pytest.raises(TraceError, match="none has"):
        complete(traces, ("model", "suffix"))


def test_halves_keep_equal_prompts_together() -> None:
    traces = hybrid_traces(sequences=8, twins=True)
    half = halves(traces)
    assert [half[f"request-{i}"] for i in range(4)] == [half[f"request-{i + 4}"] for i in range(4)]
    assert sorted(half.values()) == ["chat/first"] * 4 + ["chat/second"] * 4
    assert set(of_domains(traces, half).sequences["domain"].to_pylist()) == {"chat/first", "chat/second"}


def test_the_tuned_rule_finds_what_pays_on_other_requests() -> None:
    traces = with_suffix(hybrid_traces(sequences=10))
    closed = ClosedBatches(traces, ("model", "suffix"))
    tuned = TunedRule(closed, traces, seed=0).rates(PRICES, 1).mean()
    assert tuned > 1.05 * max(closed.rates(closed.play(d, k), PRICES, 1).mean() for d in (0, 1) for k in (2, 7, 20))


def evaluated() -> HybridFindings:
    """The whole evaluation on a made-up dataset."""
    traces = {"made": with_suffix(hybrid_traces(sequences=10))}
    return evaluate_hybrid(traces, PRICES, batches=(1, 16), steps=(7,), roles=ROLES, source="made up")


def test_the_evaluation_gives_every_cell_with_intervals() -> None:
    found = evaluated()
    assert from_json(HybridFindings, to_json(found), "findings") == found
    assert {(cell.batch, cell.pricing) for cell in found.cells} == {
        (batch, pricing) for batch in (1, 16) for pricing in (PER_ROUND, "per step, 7")
    }
    cell = found.cell("made", 1, PER_ROUND)
    forecast = cell.policy("forecast lookup")
    best, oracle = cell.best.value or 0, cell.oracle.value or 0
    assert forecast.speedup.low is not None
    assert forecast.speedup.low < (forecast.speedup.value or 0) < oracle * 1.001
    share = ((forecast.speedup.value or 0) - best) / (oracle - best)
    assert forecast.gap_share.value == pytest.approx(share, rel=1e-4)
    assert share > 0.5
    with pytest.raises(KeyError):
        cell.policy("no such")
    with pytest.raises(KeyError):
        found.cell("made", 2, PER_ROUND)


def test_targets_are_put_to_all_policies_that_learn_and_judged_against_the_best_draft() -> None:
    found = evaluated()
    learning = [p.policy for p in found.cells[0].policies if p.policy != "plain rule"]
    assert [(t.policy, t.batch, t.pricing) for t in found.targets] == [
        (policy, cell.batch, cell.pricing) for cell in found.cells for policy in learning
    ]
    for target in found.targets:
        cell = found.cell("made", target.batch, target.pricing)
        own, best = cell.policy(target.policy).speedup.value or 0, cell.best.value or 0
        assert target.margin.value == pytest.approx(own - 0.99 * best, rel=1e-3)
        assert f"{cell.best_drafter} {cell.best_tokens}" in cell.best_alike
    assert all(t.met for t in found.targets if t.batch == 1 and t.policy == "forecast lookup")


def test_the_reference_figures_of_instructcoder_come_out() -> None:
    """Best fixed 2.7, plain rule 3.9, oracle 4.4 at batch 1; 1.7, 2.1 and 2.8 at batch 32: each within 0.12."""
    path = shared_data("specdecode-bench-simulator", "data", "llama3.1-8B", "combined_instructcoder.jsonl")
    alone, crowd = reference(path.parents[3], "instructcoder")
    assert np.array([alone.best_fixed, alone.plain_rule, alone.oracle]) == pytest.approx([2.7, 3.9, 4.4], abs=0.12)
    assert np.array([crowd.best_fixed, crowd.plain_rule, crowd.oracle]) == pytest.approx([1.7, 2.1, 2.8], abs=0.12)
