"""The proof of replay on the real model: live speculative decoding against what was recorded.

These tests download the verifier once and fail where it cannot be had. float32 on the CPU, fixed seeds.
"""

from __future__ import annotations

import json

import live
import numpy as np
import pytest
import torch
from live import Round, speculate
from scipy import stats

from calibration.drafters import build_drafter, parse_drafter
from calibration.jobs.job import CalibrationSettings, calibrate
from calibration.models.sampling import distribution, generator_for
from calibration.prompts import load_prompts
from calibration.proposers.lookup import lookup_runs
from calibration.recording.reading import read_together
from calibration.traces import DecodingInfo

pytestmark = pytest.mark.model

CPU = torch.device("cpu")
DRAFTERS = ("prompt-lookup", "exit-16", "exit-20", "exit-24", "exit-28", "skip-13-17")
GREEDY = DecodingInfo(mode="greedy")
SAMPLED = DecodingInfo(mode="sampled", temperature=0.8, top_p=0.95)


@pytest.fixture(scope="module")
def drafters(smollm2):
    return {name: build_drafter(parse_drafter(name), smollm2) for name in DRAFTERS}


def prompt_file(folder, verifier, count, longest):
    """Write the first `count` bundled prompts of at most `longest` tokens, domain by domain in turn."""
    columns = [[p for p in file.prompts if len(verifier.encode(p.text)) <= longest] for file in load_prompts()]
    turns = [column[i] for i in range(12) for column in columns if i < len(column)]
    assert len(turns) >= count
    rows = [{"id": p.id, "domain": p.domain, "text": p.text} for p in turns[:count]]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def record(verifier, folder, drafters, *, prompts, longest, tokens, **options):
    """Record a TraceSet with the job that the command line uses; one batch."""
    settings = CalibrationSettings(
        verifier="smollm2-135m",
        drafters=drafters,
        prompt_file=prompt_file(folder, verifier, prompts, longest),
        max_new_tokens=tokens,
        batch_size=prompts,
        timings=False,
        device="cpu",
        dtype="float32",
        **options,
    )
    return calibrate(settings, folder / "traces")


# Greedy: the replay equals the live run round by round.


@pytest.fixture(scope="module")
def greedy(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("greedy")
    return record(smollm2, folder, DRAFTERS, prompts=8, longest=90, tokens=16, rollout_stride=0)


def replay(positions, gamma, output_tokens):
    """Walk the run lengths of one sequence and drafter, by the convention alone."""
    rounds, t = [], 1
    while t < output_tokens:
        row = positions.loc[t]
        drafted = gamma if np.isnan(row.proposal_length) else min(gamma, int(row.proposal_length))
        accepted = min(int(row.run_length), drafted)
        emitted = min(accepted + 1, output_tokens - t)
        rounds.append(Round(t, drafted, accepted, emitted))
        t += emitted
    return tuple(rounds)


def test_the_second_reading_agrees_with_the_generated_text(greedy):
    tokens = greedy.frame("sequences").output_tokens.sum()
    assert f"disagrees with 0 of {tokens} generated tokens" in " ".join(greedy.manifest.notes)


@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_replay_equals_the_live_run_round_by_round(smollm2, drafters, greedy, name, gamma):
    sequences, positions = greedy.frame("sequences"), greedy.frame("positions")
    runs = speculate(
        smollm2.model,
        drafters[name],
        [ids.tolist() for ids in sequences.prompt_token_ids],
        gamma=gamma,
        decoding=GREEDY,
        max_new_tokens=16,
        end_ids=smollm2.end_ids,
        generator=generator_for(CPU, 0),
    )
    assert len(runs) == 8
    for run, row in zip(runs, sequences.itertuples(), strict=True):
        mine = positions[(positions.sequence_id == row.sequence_id) & (positions.drafter == name)]
        assert run.ids == tuple(row.output_token_ids)
        assert run.finish_reason == row.finish_reason
        assert run.rounds == replay(mine.set_index("position"), gamma, row.output_tokens)


# Sampled: acceptance by depth.

SAMPLED_DRAFTER, GAMMA, ROWS, TOKENS = "skip-13-17", 3, 32, 148


@pytest.fixture(scope="module")
def sampled_prompts(smollm2, tmp_path_factory):
    path = prompt_file(tmp_path_factory.mktemp("sampled"), smollm2, ROWS, 90)
    return [smollm2.encode(json.loads(line)["text"]) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sampled_runs(smollm2, drafters, sampled_prompts):
    return speculate(
        smollm2.model,
        drafters[SAMPLED_DRAFTER],
        sampled_prompts,
        gamma=GAMMA,
        decoding=SAMPLED,
        max_new_tokens=TOKENS,
        end_ids=frozenset(),  # rows of one length: none rides along for nothing
        generator=generator_for(CPU, 2),
    )


def attempts(run):
    """Give (position, depth from 0, accepted) of every draft that was put to the test and could be emitted."""
    for r in run.rounds:
        for depth in range(min(r.accepted + 1, r.drafted, len(run.ids) - r.start)):
            yield r.start + depth, depth, depth < r.accepted


def test_sampled_acceptance_given_the_live_text(smollm2, drafters, sampled_prompts, sampled_runs):
    """Given the text, every depth is accepted independently with the a of its position: a martingale."""
    assert sum(len(run.rounds) for run in sampled_runs) >= 2000
    read = read_together(
        smollm2.model,
        {"d": drafters[SAMPLED_DRAFTER].model},
        sampled_prompts,
        [run.ids for run in sampled_runs],
        SAMPLED,
        generator_for(CPU, 0),
    )
    accept = read.drafters["d"]["accept"]
    difference, variance = np.zeros(GAMMA), np.zeros(GAMMA)
    for row, run in enumerate(sampled_runs):
        for position, depth, accepted in attempts(run):
            a = float(accept[row, position])
            difference[depth] += accepted - a
            variance[depth] += a * (1 - a)
    assert (variance > 10).all()
    assert (np.abs(difference) < 3 * np.sqrt(variance)).all()


def expected_counts(accept, gamma):
    """Expected (attempts, acceptances) [gamma] of a replay of one recorded sequence, by its chain of round starts."""
    count = len(accept)
    start = np.zeros(count + gamma + 2)
    start[1] = 1.0
    tried, taken = np.zeros(gamma), np.zeros(gamma)
    for t in range(1, count):
        reach = start[t]
        for depth in range(gamma + 1):
            if depth == gamma or t + depth >= count:
                start[t + depth + 1] += reach  # all accepted; the bonus token follows
                break
            a = accept[t + depth]
            tried[depth] += reach
            taken[depth] += reach * a
            start[t + depth + 1] += reach * (1 - a)  # rejected here; the replacement is emitted
            reach *= a
    return tried, taken


def ratio(tried, taken):
    """Ratio of sums over sequences [sequences, gamma], and its standard error with sequences as clusters."""
    estimate = taken.sum(0) / tried.sum(0)
    rest = taken - estimate * tried
    clusters = len(tried)
    return estimate, np.sqrt(clusters / (clusters - 1) * (rest**2).sum(0)) / tried.sum(0)


def test_sampled_acceptance_predicted_from_a_trace_of_other_text(smollm2, sampled_runs, tmp_path):
    """Same prompts, other draws: the replay of one text against the live run of another, over the same horizon."""
    horizon = 48
    traces = record(
        smollm2,
        tmp_path,
        (SAMPLED_DRAFTER,),
        prompts=ROWS,
        longest=90,
        tokens=horizon,
        rollout_stride=0,
        temperature=SAMPLED.temperature,
        top_p=SAMPLED.top_p,
        seed=77,
    )
    groups = traces.frame("positions").groupby("sequence_id", sort=False).accept_probability
    predicted = [expected_counts(column.to_numpy(), GAMMA) for _, column in groups]
    observed = np.zeros((len(sampled_runs), 2, GAMMA))
    for row, run in enumerate(sampled_runs):
        ends = [t for t, token in enumerate(run.ids) if token in smollm2.end_ids]
        length = min([horizon, *(t + 1 for t in ends)])
        for position, depth, accepted in attempts(run):
            if position < length:
                observed[row, :, depth] += 1, accepted
    replayed, replay_se = ratio(*(np.array(part) for part in zip(*predicted, strict=True)))
    measured, live_se = ratio(observed[:, 0], observed[:, 1])
    assert (replay_se < 0.1).all()
    assert (np.abs(replayed - measured) < 3 * np.hypot(replay_se, live_se)).all()


def test_sampled_prompt_lookup_rounds_follow_from_the_text(smollm2, drafters, sampled_prompts):
    """A proposal is given by the text, so its rounds replay exactly under sampling too."""
    prompts = sampled_prompts[:8]
    runs = speculate(
        smollm2.model,
        drafters["prompt-lookup"],
        prompts,
        gamma=4,
        decoding=SAMPLED,
        max_new_tokens=24,
        end_ids=smollm2.end_ids,
        generator=generator_for(CPU, 3),
    )
    for prompt, run in zip(prompts, runs, strict=True):
        lengths, proposals = lookup_runs(prompt, run.ids)
        t = 1
        for r in run.rounds:
            drafted = min(4, proposals[t])
            accepted = min(lengths[t], drafted)
            assert (r.start, r.drafted, r.accepted) == (t, drafted, accepted)
            t += r.emitted
        assert t == len(run.ids)


# Sampled: the text of the live loop is distributed as the verifier's own.


def exact(verifier, prompt, horizon):
    """Probability of continuations by the chain rule over plain passes; rare ones (< 1e-4) are left out."""
    table = {(): 1.0}
    for _ in range(horizon):
        texts = list(table)
        tokens = torch.tensor([[*prompt, *text] for text in texts])
        p = distribution(
            verifier.model(input_ids=tokens, logits_to_keep=1).logits[:, -1], SAMPLED.temperature, SAMPLED.top_p
        )
        grown = {}
        for text, row in zip(texts, p, strict=True):
            for token in row.nonzero()[:, 0].tolist():
                mass = table[text] * float(row[token])
                if mass > 1e-4:
                    grown[(*text, token)] = mass
        table = grown
    return table


def p_value(verifier, drafter, text, horizon, rows=256, batches=2):
    """Chi-square of the live loop's first `horizon` tokens; the first comes from the prefill, gamma is 2."""
    prompt = verifier.tokenizer(text).input_ids
    table = exact(verifier, prompt, horizon)
    seen = dict.fromkeys(table, 0)
    for batch in range(batches):
        runs = speculate(
            verifier.model,
            drafter,
            [prompt] * rows,
            gamma=2,
            decoding=SAMPLED,
            max_new_tokens=horizon,
            end_ids=frozenset(),
            generator=generator_for(CPU, 5, batch),
        )
        for run in runs:
            seen[run.ids] = seen.get(run.ids, 0) + 1
    total = rows * batches
    big = [key for key, mass in table.items() if mass * total >= 5]
    assert len(big) >= 10
    observed = [seen[key] for key in big]
    expected = [table[key] * total for key in big]
    return stats.chisquare([*observed, total - sum(observed)], [*expected, total - sum(expected)]).pvalue


DAYS, LETTERS = "Monday, Tuesday,", "a b a b a b"


@pytest.mark.parametrize(("name", "text", "horizon"), [("exit-20", DAYS, 3), ("prompt-lookup", LETTERS, 2)])
def test_live_text_is_distributed_as_the_verifiers_own(smollm2, drafters, name, text, horizon):
    assert p_value(smollm2, drafters[name], text, horizon) > 1e-3


def test_accepting_always_fails_the_same_test(smollm2, drafters, monkeypatch):
    monkeypatch.setattr(live, "leading", lambda flags: torch.full((len(flags),), flags.shape[1]))
    assert p_value(smollm2, drafters["exit-20"], DAYS, 2, batches=1) < 1e-6


def test_replacing_without_the_residual_fails_the_same_test(smollm2, drafters, monkeypatch):
    monkeypatch.setattr(live, "residual", lambda p, q: p)
    assert p_value(smollm2, drafters["exit-20"], DAYS, 3) < 1e-6
