"""The dynamic exit layer: its choice, its drafts and its live loop against step-by-step references."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from replayed import GREEDY, SAMPLED, live, recorded, rows_of, same_rounds, written
from scipy import stats
from tiny import random_prompts, tiny_verifier

import calibration.drafters.exits as exits_module
from calibration.common.errors import CalibrationError
from calibration.drafters import DynamicExit, build_drafter, submodel
from calibration.drafters.exit_plan import HitRates, Plan, Planning, make_plan, tokens_per_layer
from calibration.models.sampling import distribution

EXITS, LAYERS = (1, 2, 5), 9


@pytest.fixture(scope="module")
def deep() -> Any:
    """A verifier whose upper layers change little, so that its exits are right now and then."""
    verifier = tiny_verifier(4, layers=LAYERS, spread=0.25)
    for layer in verifier.model.model.layers[1:]:
        layer.self_attn.o_proj.weight *= 0.3
        layer.mlp.down_proj.weight *= 0.3
    return verifier


def settings(**changes: Any) -> DynamicExit:
    return DynamicExit(**{"exits": EXITS, "half_life": 4.0, "max_draft_tokens": 5, "name": "d", **changes})


def logits_after(model: Any, text: Sequence[int]) -> torch.Tensor:
    text = list(text)
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]


@functools.cache
def shadow(model: Any, text: tuple[int, ...]) -> int:
    """The token that an exit, run on this text, names next."""
    return int(logits_after(model, text).argmax())


def naive_rates(models: list[Any], text: list[int], half_life: float) -> list[float]:
    """Weighted shares of the tokens that each exit, run on every prefix, would have named."""
    weights = [0.5 ** ((len(text) - 1 - i) / half_life) for i in range(1, len(text))]
    shares = []
    for model in models:
        hits = [shadow(model, tuple(text[:i])) == text[i] for i in range(1, len(text))]
        shares.append(sum(w * h for w, h in zip(weights, hits, strict=True)) / sum(weights) if weights else 0.0)
    return shares


def naive_plan(rates: list[float], given: DynamicExit, layers: int) -> tuple[int, int]:
    """The exit (its place) and length of the largest tokens per layer, by the closed form."""
    best, found = -1.0, (0, 0)
    for place, (rate, depth) in enumerate(zip(rates, given.exits, strict=True)):
        for d in range(given.min_draft_tokens, given.max_draft_tokens + 1):
            expected = d + 1 if rate == 1 else (1 - rate ** (d + 1)) / (1 - rate)
            if expected / (d * depth + layers) > best + 1e-12:
                best, found = expected / (d * depth + layers), (place, d)
    return found


def naive_draft(models: list[Any], text: list[int], given: DynamicExit, layers: int) -> tuple[list[int], int]:
    """The greedy draft behind `text` and the exit's layers, one plain pass a token."""
    rates = naive_rates(models, text, given.half_life)
    place, d = naive_plan(rates, given, layers)
    sure, tokens = 1.0, []
    while len(tokens) < d:
        logits = logits_after(models[place], [*text, *tokens])
        tokens.append(int(logits.argmax()))
        sure *= float(torch.softmax(logits, 0).max())
        if given.stop_early and sure < rates[place] ** d - 1e-9:
            break
    return tokens, given.exits[place]


@pytest.mark.parametrize("changes", [{}, {"stop_early": False}, {"min_draft_tokens": 0}])
def test_greedy_drafts_are_those_of_one_pass_a_token(deep: Any, changes: dict[str, Any]) -> None:
    given = settings(**changes)
    drafter = build_drafter(given, deep)
    models = [submodel(deep.model, tuple(range(n))) for n in EXITS]
    prompts = random_prompts(4, 2, 1, 7)
    outputs = written(deep, GREEDY, prompts, 24)
    trace = recorded(deep, [drafter], prompts, outputs, GREEDY, stride=1)
    seen: set[tuple[int, int]] = set()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        got = rows_of(trace.positions, f"r{row}", "d")
        for t in range(len(output.ids)):
            tokens, layers = naive_draft(models, [*prompt, *output.ids[:t]], given, LAYERS)
            run = 0
            while run < len(tokens) and output.ids[t + run : t + run + 1] == (tokens[run],):
                run += 1
            assert got["proposal_length"][t] == len(tokens)
            assert got["draft_layers"][t] == [layers * (j + 1) for j in range(len(tokens))]
            assert got["run_length"][t] == run
            seen.add((layers if tokens else 0, len(tokens)))
    assert len({layers for layers, _ in seen}) > 1
    assert len({length for _, length in seen}) > 1
    assert (0 in {length for _, length in seen}) == (changes.get("min_draft_tokens") == 0)


@pytest.mark.parametrize("changes", [{}, {"min_draft_tokens": 0, "half_life": 20.0}, {"stop_early": False}])
def test_greedy_rounds_are_those_of_the_replay(deep: Any, changes: dict[str, Any]) -> None:
    assert same_rounds(deep, build_drafter(settings(**changes), deep), tokens=40) > 20


def eager(planning: Planning, rates: np.ndarray) -> Plan:
    """Always five tokens, of one of two exits, stopped where confidence is below a tenth."""
    return Plan(int(rates[0] < rates[1] + 0.1), 5, 0.1)


@pytest.mark.parametrize("gamma", [2, 5])
@pytest.mark.parametrize("plan", [make_plan, eager])
def test_a_live_round_is_one_draw_of_what_is_recorded_given_the_text(
    deep: Any, gamma: int, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the text, (drafted, accepted) of a live round and of the recording at its start have one law."""
    monkeypatch.setattr(exits_module, "make_plan", plan)
    drafter = build_drafter(settings(min_draft_tokens=2, half_life=30.0), deep)
    prompts = random_prompts(2, 40)
    runs = live(deep, drafter, prompts, gamma, SAMPLED, 40)
    trace = recorded(deep, [drafter], prompts, runs, SAMPLED, seed=5)
    found = []
    for row, run in enumerate(runs):
        got = rows_of(trace.positions, f"r{row}", "d")
        for r in run.rounds:
            if r.start + 5 < len(run.ids):
                drafted = min(gamma, got["proposal_length"][r.start])
                accepted = min(got["run_length"][r.start], drafted)
                found.append((r.drafted, r.accepted, r.accepted == r.drafted, drafted, accepted, accepted == drafted))
    table = np.array(found, dtype=int)
    differences = table[:, :3] - table[:, 3:]
    assert len(table) > 300
    assert (differences[:, 1] != 0).sum() > 50
    assert plan is make_plan or gamma == 2 or (differences[:, 0] != 0).sum() > 30
    for column in differences.T:
        assert abs(column.sum()) < 3.5 * np.sqrt((column**2).sum() + 1)


def test_sampled_first_drafts_are_described(deep: Any) -> None:
    drafter = build_drafter(settings(), deep)
    models = dict(zip(EXITS, drafter.models, strict=True))
    prompts = random_prompts(6, 2)
    outputs = written(deep, SAMPLED, prompts, 20)
    trace = recorded(deep, [drafter], prompts, outputs, SAMPLED)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        got = rows_of(trace.positions, f"r{row}", "d")
        for t, token in enumerate(output.ids):
            text = [*prompt, *output.ids[:t]]
            logits = logits_after(models[got["draft_layers"][t][0]], text)
            p, q = (distribution(x, 0.8, 0.9) for x in (logits_after(deep.model, text), logits))
            assert got["accept_probability"][t] == pytest.approx(min(1.0, float(q[token] / p[token])), abs=1e-4)
            assert got["overlap"][t] == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-5)
            assert got["drafter_confidence"][t] == pytest.approx(float(q.max()), abs=1e-5)
            assert got["emitted_rank"][t] == int((logits > logits[token]).sum())


SMALL, HORIZON, ROWS = 7, 3, 4000


def test_sampled_text_is_distributed_as_the_verifiers_own() -> None:
    small = tiny_verifier(5, vocabulary=SMALL, spread=0.35)
    drafter = build_drafter(settings(exits=(1, 2, 3), half_life=2.0), small)
    prompt = [6, 5, 4, 3, 2, 1, 0]
    table = {}
    for text in itertools.product(range(SMALL), repeat=HORIZON):
        logits = small.model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
        p = distribution(logits[len(prompt) - 1 : -1], SAMPLED.temperature, SAMPLED.top_p)
        table[text] = float(np.prod([float(p[i, token]) for i, token in enumerate(text)]))
    seen = dict.fromkeys(table, 0)
    for run in live(small, drafter, [prompt] * ROWS, 3, SAMPLED, HORIZON, frozenset()):
        seen[run.ids] += 1
    big = [text for text, p in table.items() if p * ROWS >= 8]
    observed, expected = [seen[text] for text in big], [table[text] * ROWS for text in big]
    assert stats.chisquare([*observed, ROWS - sum(observed)], [*expected, ROWS - sum(expected)]).pvalue > 1e-3


def test_hit_rates_halve_with_the_half_life() -> None:
    rates = HitRates(2, 2.0)
    assert rates.rates.tolist() == [0.0, 0.0]
    rates.add(np.array([[True, False]]))
    assert rates.rates.tolist() == [1.0, 0.0]
    rates.add(np.array([[False, True], [False, True]]))
    weights = [0.5, 0.5**0.5, 1.0]
    assert rates.rates == pytest.approx([weights[0] / sum(weights), sum(weights[1:]) / sum(weights)])


def test_plans_maximise_tokens_per_layer() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        rates = rng.random(3)
        given = settings(max_draft_tokens=int(rng.integers(1, 9)), min_draft_tokens=int(rng.integers(0, 2)))
        plan = make_plan(given.planning(LAYERS), rates)
        assert (plan.exit, plan.tokens) == naive_plan(rates.tolist(), given, LAYERS)
        assert plan.threshold == pytest.approx(rates[plan.exit] ** plan.tokens)


def test_certain_exits_draft_as_far_as_allowed_and_hopeless_ones_do_not() -> None:
    assert make_plan(settings().planning(LAYERS), np.array([1.0, 1.0, 1.0])).tokens == 5
    assert make_plan(settings().planning(LAYERS), np.array([1.0, 1.0, 1.0])).exit == 0
    assert make_plan(settings(min_draft_tokens=0).planning(LAYERS), np.zeros(3)).tokens == 0
    assert make_plan(settings().planning(LAYERS), np.zeros(3)).tokens == 1
    value = tokens_per_layer(np.array([1.0]), (2,), LAYERS, 3)
    assert value.tolist() == [[1 / 9, 2 / 11, 3 / 13, 4 / 15]]


def test_settings_that_do_not_fit_are_refused(deep: Any) -> None:
    with pytest.raises(CalibrationError, match=r"exits must lie in \[1, 8\], got 9"):
        build_drafter(settings(exits=(2, 9)), deep)
    with pytest.raises(ValidationError, match="must be a rising list"):
        settings(exits=(3, 3))
    with pytest.raises(ValidationError, match="must be >= min_draft_tokens = 2, got 1"):
        settings(min_draft_tokens=2, max_draft_tokens=1)


def test_the_manifest_says_what_drafted(deep: Any) -> None:
    info = build_drafter(settings(), deep).info
    assert (info.layers, info.max_draft_tokens, info.deterministic) == (5, 5, False)
    assert info.settings["exits"] == list(EXITS)
    assert build_drafter(settings(), deep).step(2, 8, torch.Generator())() > 0
