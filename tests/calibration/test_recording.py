"""Generation, the teacher-forced reading, run lengths and rollouts against one-token-at-a-time references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_prompts

import calibration.models.lane as rollouts_module
import calibration.recording.reading as reading_module
from calibration.drafters import build_drafter, parse_drafter
from calibration.models.lane import cut, generate, rollout
from calibration.models.sampling import generator_for
from calibration.recording.reading import read_together, run_lengths
from calibration.recording.record import Request, record
from calibration.traces import DecodingInfo

CPU = torch.device("cpu")
GREEDY = DecodingInfo(mode="greedy")
SAMPLED = DecodingInfo(mode="sampled", temperature=0.8, top_p=0.9)
NAMES = ("prompt-lookup", "exit-2", "exit-3", "skip-1-2")


def seeded(seed: int = 0) -> torch.Generator:
    return generator_for(CPU, seed)


def logits_after(model, text) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0, -1]


def softmax(values: torch.Tensor) -> np.ndarray:
    x = values.double().numpy()
    x = np.exp(x - x.max())
    return x / x.sum()


def nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    order = np.argsort(-probs)
    count = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1
    kept = np.zeros_like(probs)
    kept[order[:count]] = probs[order[:count]]
    return kept / kept.sum()


@pytest.fixture(scope="module")
def drafters(tiny):
    return [build_drafter(parse_drafter(name), tiny) for name in NAMES]


def written(tiny, decoding, rows=4, length=24, ends=frozenset({2, 40, 41})):
    prompts = random_prompts(11, rows)
    return prompts, generate(tiny.model, prompts, decoding, length, ends, seeded())


def test_greedy_generation_is_the_naive_loop(tiny):
    prompts, outputs = written(tiny, GREEDY)
    assert {o.finish_reason for o in outputs} == {"stop", "length"}
    for prompt, output in zip(prompts, outputs, strict=True):
        text = list(prompt)
        for token in output.ids:
            assert int(logits_after(tiny.model, text).argmax()) == token
            text.append(token)
        ended = output.ids[-1] in {2, 40, 41}
        assert ended == (output.finish_reason == "stop")
        assert ended or len(output.ids) == 24
        assert not {2, 40, 41} & set(output.ids[:-1])


def test_sampled_generation_repeats_with_its_seed_and_stays_in_the_nucleus(tiny):
    prompts, outputs = written(tiny, SAMPLED)
    assert outputs == written(tiny, SAMPLED)[1]
    assert outputs != generate(tiny.model, prompts, SAMPLED, 24, frozenset({2, 40, 41}), seeded(1))
    text = list(prompts[0])
    for token in outputs[0].ids:
        assert nucleus(softmax(logits_after(tiny.model, text) / 0.8), 0.9)[token] > 0
        text.append(token)


def test_an_output_ends_with_its_first_end_token():
    assert cut([5, 2, 7, 2], frozenset({2})).ids == (5, 2)
    assert cut([5, 2], frozenset({2})).finish_reason == "stop"
    assert cut([5, 6], frozenset({2})).finish_reason == "length"


@given(st.lists(st.booleans(), max_size=30))
def test_run_lengths_count_ones(bits):
    wanted = [next((j for j, bit in enumerate(bits[t:]) if not bit), len(bits) - t) for t in range(len(bits))]
    assert run_lengths(np.array(bits, dtype=bool)).tolist() == wanted


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [5, 64])
def test_the_reading_sees_what_a_pass_over_every_prefix_sees(tiny, drafters, decoding, chunk, monkeypatch):
    monkeypatch.setattr(reading_module, "CHUNK", chunk)
    prompts, outputs = written(tiny, decoding)
    drafter = drafters[1]
    texts = [o.ids for o in outputs]
    read = read_together(tiny.model, {"d": drafter.model}, prompts, texts, decoding, seeded())
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for t, token in enumerate(output.ids):
            prefix = [*prompt, *output.ids[:t]]
            p_logits, q_logits = logits_after(tiny.model, prefix), logits_after(drafter.model, prefix)
            scale = 1.0 if decoding.mode == "greedy" else decoding.temperature
            p, q = softmax(p_logits / scale), softmax(q_logits / scale)
            if decoding.mode == "sampled":
                p, q = nucleus(p, decoding.top_p), nucleus(q, decoding.top_p)
            with np.errstate(divide="ignore", invalid="ignore"):
                entropy = [float(-np.nansum(np.where(x > 0, x * np.log(x), 0.0))) for x in (p, q)]
            verifier = {key: values[row, t] for key, values in read.verifier.items()}
            mine = {key: values[row, t] for key, values in read.drafters["d"].items()}
            assert verifier["match"] == (int(p_logits.argmax()) == token)
            assert verifier["probability"] == pytest.approx(p[token], abs=1e-5)
            assert verifier["confidence"] == pytest.approx(p.max(), abs=1e-5)
            assert verifier["entropy"] == pytest.approx(entropy[0], abs=1e-4)
            assert mine["match"] == (int(q_logits.argmax()) == token)
            assert mine["accept"] == pytest.approx(min(1.0, q[token] / p[token]), abs=1e-4)
            assert mine["rank"] == int((q_logits > q_logits[token]).sum())
            assert mine["confidence"] == pytest.approx(q.max(), abs=1e-5)
            assert mine["entropy"] == pytest.approx(entropy[1], abs=1e-4)
            assert mine["overlap"] == pytest.approx(np.minimum(p, q).sum(), abs=1e-5)
            if decoding.mode == "greedy":
                assert mine["drafted"] == int(q_logits.argmax())


def recorded(tiny, drafters, decoding, **options):
    prompts, outputs = written(tiny, decoding)
    requests = [Request(f"r{i}", "chat", tuple(p)) for i, p in enumerate(prompts)]
    settings = {"gamma_max": 4, "rollout_stride": 5, **options}
    return prompts, outputs, record(tiny.model, drafters, requests, outputs, decoding, seeded(), **settings)


def rows_of(columns, sequence, drafter):
    keys = zip(columns["sequence_id"], columns["drafter"], strict=True)
    pick = [i for i, key in enumerate(keys) if key == (sequence, drafter)]
    return {name: [values[i] for i in pick] for name, values in columns.items()}


def test_run_lengths_are_those_of_free_drafts_from_every_position(tiny, drafters):
    """The reference lets each drafter run on by itself from every t, and counts what agrees."""
    prompts, outputs, recording = recorded(tiny, drafters, GREEDY)
    seen = set()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for drafter in drafters[1:]:
            got = rows_of(recording.positions, f"r{row}", drafter.name)
            assert got["position"] == list(range(len(output.ids)))
            for t in range(len(output.ids)):
                run = 0
                while t + run < len(output.ids):
                    draft = int(logits_after(drafter.model, [*prompt, *output.ids[: t + run]]).argmax())
                    if draft != output.ids[t + run]:
                        break
                    run += 1
                assert got["run_length"][t] == run
                assert got["accept_probability"][t] == (run > 0)
                assert got["proposal_length"][t] is None
                seen.add(run)
    assert max(seen) >= 2
    assert recording.disagreements == 0
    assert recording.tokens == sum(len(o.ids) for o in outputs)


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_prompt_lookup_columns_follow_a_plain_search(tiny, drafters, decoding):
    prompts, outputs, recording = recorded(tiny, drafters, decoding)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        got = rows_of(recording.positions, f"r{row}", "prompt-lookup")
        for t, token in enumerate(output.ids):
            text = [*prompt, *output.ids[:t]]
            draft = next(
                (
                    text[start + n : start + n + 20]
                    for n in (3, 2, 1)
                    for start in range(len(text) - n)
                    if n < len(text) and text[start : start + n] == text[-n:]
                ),
                [],
            )
            assert got["proposal_length"][t] == len(draft)
            assert got["drafter_confidence"][t] is None
            if not draft:
                assert got["accept_probability"][t] is None
                assert got["overlap"][t] is None
                continue
            p = softmax(logits_after(tiny.model, text) / (decoding.temperature or 1.0))
            p = nucleus(p, decoding.top_p) if decoding.mode == "sampled" else p
            assert got["accept_probability"][t] == (draft[0] == token)
            assert got["overlap"][t] == pytest.approx(p[draft[0]], abs=1e-5)
            assert (got["run_length"][t] > 0) == (draft[0] == token)


def test_sampled_model_drafters_have_no_run_length(tiny, drafters):
    _, _, recording = recorded(tiny, drafters, SAMPLED)
    got = rows_of(recording.positions, "r0", "exit-3")
    assert set(got["run_length"]) == {None}
    assert 0 < np.mean(got["accept_probability"]) < 1


def test_disagreements_are_counted(tiny, drafters):
    prompts, outputs = written(tiny, GREEDY, rows=2)
    wrong = [cut([(x + 1) % 97 for x in o.ids], frozenset()) for o in outputs]
    requests = [Request(f"r{i}", "chat", tuple(p)) for i, p in enumerate(prompts)]
    recording = record(tiny.model, drafters, requests, wrong, GREEDY, seeded(), gamma_max=1, rollout_stride=0)
    matches = sum(
        int(logits_after(tiny.model, [*p, *o.ids[:t]]).argmax()) == o.ids[t]
        for p, o in zip(prompts, wrong, strict=True)
        for t in range(len(o.ids))
    )
    assert recording.disagreements == recording.tokens - matches > 0
    assert recording.rollouts == {}


def test_rollouts_equal_the_naive_loop(tiny, drafters):
    prompts, outputs, recording = recorded(tiny, drafters, GREEDY)
    checked = 0
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for drafter in drafters[1:]:
            got = rows_of(recording.rollouts, f"r{row}", drafter.name)
            starts = list(range(0, len(output.ids), 5))
            assert got["position"] == [t for t in starts for _ in range(4)]
            assert got["step"] == [1, 2, 3, 4] * len(starts)
            for index, t in enumerate(starts):
                text = [*prompt, *output.ids[:t]]
                for step in range(4):
                    logits = logits_after(drafter.model, text)
                    q = softmax(logits)
                    at = 4 * index + step
                    assert got["drafter_confidence"][at] == pytest.approx(q.max(), abs=1e-5)
                    assert got["drafter_entropy"][at] == pytest.approx(-(q * np.log(q)).sum(), abs=1e-4)
                    text.append(int(logits.argmax()))
                    checked += 1
    assert checked > 100
    assert "prompt-lookup" not in recording.rollouts["drafter"]


def test_sampled_rollouts_go_on_from_the_tokens_that_were_drawn(tiny, drafters, monkeypatch):
    """With "second most probable" in place of the draw, the packed branches must follow that very path."""
    monkeypatch.setattr(rollouts_module, "choose", lambda logits, decoding, generator: logits.topk(2).indices[..., 1])
    drafter, prompts = drafters[2], random_prompts(5, 2, 4, 9)
    texts = [o.ids for o in generate(tiny.model, prompts, SAMPLED, 12, frozenset(), seeded())]
    read = read_together(tiny.model, {"d": drafter.model}, prompts, texts, SAMPLED, seeded())
    starts = [0, 3, 7, 11]
    _, confidence, entropy = rollout(
        read.lanes["d"],
        torch.as_tensor(read.drafters["d"]["drafted"][:, starts]),
        torch.tensor(starts),
        origin=read.origin,
        prompt_tokens=read.prompt_tokens,
        steps=5,
        decoding=SAMPLED,
        generator=seeded(),
    )
    assert confidence.shape == entropy.shape == (2, 4, 4)
    for row in range(2):
        for branch, t in enumerate(starts):
            text = [*prompts[row], *texts[row][:t], int(read.drafters["d"]["drafted"][row, t])]
            for step in range(4):
                logits = logits_after(drafter.model, text)
                q = nucleus(softmax(logits / 0.8), 0.9)
                assert float(confidence[row, branch, step]) == pytest.approx(q.max(), abs=1e-5)
                text.append(int(logits.topk(2).indices[1]))


def test_first_drafts_of_sampled_rollouts_are_drawn_from_the_drafter(tiny, drafters):
    """Over many seeds, the drafted token at one position is distributed as q there."""
    from scipy import stats

    drafter, prompt = drafters[2], random_prompts(5, 1, 6, 6)[0]
    rows = 3000
    read = read_together(tiny.model, {"d": drafter.model}, [prompt] * rows, [[9]] * rows, SAMPLED, seeded())
    q = nucleus(softmax(logits_after(drafter.model, prompt) / 0.8), 0.9)
    counts = np.bincount(read.drafters["d"]["drafted"][:, 0], minlength=97)
    assert counts[q == 0].sum() == 0
    big = q * rows >= 5
    observed = [*counts[big], counts[~big].sum()] if q[~big].sum() > 0 else counts[big]
    expected = [*(q[big] * rows), q[~big].sum() * rows] if q[~big].sum() > 0 else q[big] * rows
    assert stats.chisquare(observed, expected).pvalue > 1e-3
