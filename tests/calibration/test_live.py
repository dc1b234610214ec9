"""The live loop on a small model: equal to the replay where it must be, exact in distribution where it draws."""

from __future__ import annotations

import itertools

import live
import numpy as np
import pytest
import torch
from live import leading, speculate, verify
from replayed import recorded, rows_of, walk, written
from scipy import stats
from tiny import random_prompts, tiny_verifier

from calibration.drafters import build_drafter, parse_drafter
from calibration.models.drafter import Proposal
from calibration.models.lane import generate
from calibration.models.sampling import distribution, generator_for
from calibration.recording.reading import read_together
from calibration.traces import DecodingInfo

CPU = torch.device("cpu")
GREEDY = DecodingInfo(mode="greedy")
SAMPLED = DecodingInfo(mode="sampled", temperature=0.8, top_p=0.9)
NAMES = ("prompt-lookup", "exit-2", "exit-3", "skip-1-2")
ENDS = frozenset({2, 40, 41})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
def test_greedy_rounds_are_those_of_the_replay(tiny, name, gamma):
    prompts = random_prompts(11, 6)
    drafter = build_drafter(parse_drafter(name), tiny)
    outputs = written(tiny, GREEDY, prompts, 30)
    trace = recorded(tiny, [drafter], prompts, outputs, GREEDY, gamma_max=1)
    runs = speculate(
        tiny.model,
        drafter,
        prompts,
        gamma=gamma,
        decoding=GREEDY,
        max_new_tokens=30,
        end_ids=ENDS,
        generator=generator_for(CPU, 0),
    )
    assert {o.finish_reason for o in outputs} == {"stop", "length"}
    for row, (run, output) in enumerate(zip(runs, outputs, strict=True)):
        assert (run.ids, run.finish_reason) == (output.ids, output.finish_reason)
        assert run.rounds == walk(rows_of(trace.positions, f"r{row}", name), gamma)
        assert 1 + sum(r.emitted for r in run.rounds) == len(run.ids)


def test_rounds_stop_with_the_end_token_inside_an_accepted_draft(tiny):
    """A drafter that is the verifier itself is always right; drafts reach over the end, and are cut there."""
    prompts = random_prompts(11, 6)
    twin = build_drafter(parse_drafter("exit-3"), tiny_verifier(1, layers=4))
    twin = type(twin)(twin.info, tiny.model)
    outputs = generate(tiny.model, prompts, GREEDY, 30, ENDS, generator_for(CPU, 0))
    runs = speculate(
        tiny.model,
        twin,
        prompts,
        gamma=4,
        decoding=GREEDY,
        max_new_tokens=30,
        end_ids=ENDS,
        generator=generator_for(CPU, 0),
    )
    for run, output in zip(runs, outputs, strict=True):
        assert run.ids == output.ids
        starts = range(1, len(output.ids), 5)
        assert [r.start for r in run.rounds] == list(starts)
        left = [len(output.ids) - t for t in starts]
        assert [r.accepted for r in run.rounds] == [min(4, n) for n in left]
        assert [r.emitted for r in run.rounds] == [min(5, n) for n in left]


def test_leading_counts_up_to_the_first_false():
    flags = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert leading(flags).tolist() == [2, 0, 4]


def test_greedy_verification_compares_with_the_largest_logit():
    logits = torch.zeros(2, 3, 5)
    logits[:, 0, 3] = logits[:, 1, 1] = logits[:, 2, 4] = 1.0
    proposal = Proposal(torch.tensor([[3, 1], [3, 1]]), torch.tensor([2, 1]), None)
    verdict = verify(logits, proposal, GREEDY, generator_for(CPU, 0))
    assert verdict.accepted.tolist() == [2, 1]  # the second row drafted one token only
    assert verdict.nodes.tolist() == [[True, True], [True, False]]
    assert verdict.following.tolist() == [4, 1]


# The output's distribution: vocabulary of 7, so that every continuation of three tokens can be enumerated.
SMALL, HORIZON, ROWS = 7, 3, 6000


@pytest.fixture(scope="module")
def small():
    return tiny_verifier(5, vocabulary=SMALL, spread=0.35)


def exact(small, prompt):
    """Probability of every continuation of HORIZON tokens, by the chain rule over plain passes."""
    table = {}
    for text in itertools.product(range(SMALL), repeat=HORIZON):
        logits = small.model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
        p = distribution(logits[len(prompt) - 1 : -1], SAMPLED.temperature, SAMPLED.top_p)
        table[text] = float(np.prod([float(p[i, token]) for i, token in enumerate(text)]))
    return table


def p_value(small, name, gamma, seed=0):
    """Chi-square of the live loop's first tokens against the exact distribution."""
    prompt = [6, 5, 4, 3, 2, 1, 0]  # holds every token, so that prompt lookup always has something to propose
    runs = speculate(
        small.model,
        build_drafter(parse_drafter(name), small),
        [prompt] * ROWS,
        gamma=gamma,
        decoding=SAMPLED,
        max_new_tokens=HORIZON,
        end_ids=frozenset(),
        generator=generator_for(CPU, seed),
    )
    table = exact(small, prompt)
    assert sum(table.values()) == pytest.approx(1.0, abs=1e-5)
    seen = dict.fromkeys(table, 0)
    for run in runs:
        seen[run.ids] += 1
    big = [text for text, p in table.items() if p * ROWS >= 8]
    observed = [seen[text] for text in big]
    expected = [table[text] * ROWS for text in big]
    return stats.chisquare([*observed, ROWS - sum(observed)], [*expected, ROWS - sum(expected)]).pvalue


@pytest.mark.parametrize("name", ["prompt-lookup", "exit-1", "exit-3"])
@pytest.mark.parametrize("gamma", [1, 3])
def test_sampled_text_is_distributed_as_the_verifiers_own(small, name, gamma):
    assert p_value(small, name, gamma) > 1e-3


@pytest.mark.parametrize("name", ["prompt-lookup", "exit-1"])
def test_a_wrong_acceptance_rule_would_be_noticed(small, name, monkeypatch):
    monkeypatch.setattr(live, "leading", lambda flags: torch.full((len(flags),), flags.shape[1]))
    assert p_value(small, name, 2) < 1e-9


@pytest.mark.parametrize("name", ["prompt-lookup", "exit-1"])
def test_a_missing_residual_would_be_noticed(small, name, monkeypatch):
    monkeypatch.setattr(live, "residual", lambda p, q: p)
    assert p_value(small, name, 2) < 1e-9


@pytest.mark.parametrize("name", ["exit-2", "exit-3"])
def test_sampled_acceptance_by_depth_is_the_recorded_probability(tiny, name):
    """Given the text, depth j is accepted with the probability a of its position, independently of the others."""
    gamma = 4
    drafter = build_drafter(parse_drafter(name), tiny)
    prompts = random_prompts(2, 60)
    runs = speculate(
        tiny.model,
        drafter,
        prompts,
        gamma=gamma,
        decoding=SAMPLED,
        max_new_tokens=60,
        end_ids=ENDS,
        generator=generator_for(CPU, 4),
    )
    read = read_together(
        tiny.model, {"d": drafter.model}, prompts, [r.ids for r in runs], SAMPLED, generator_for(CPU, 0)
    )
    accept = read.drafters["d"]["accept"]
    total = np.zeros((3, gamma))
    for row, run in enumerate(runs):
        for r in run.rounds:
            for depth in range(min(r.accepted + 1, gamma, len(run.ids) - r.start)):
                a = accept[row, r.start + depth]
                total[:, depth] += (depth < r.accepted) - a, a * (1 - a), 1
    assert total[2, 0] > 1000
    assert (np.abs(total[0]) < 3 * np.sqrt(total[1])).all()
