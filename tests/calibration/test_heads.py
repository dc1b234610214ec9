"""Heads that draft: against a plain reference, live against replay, and exact in distribution."""

from __future__ import annotations

import itertools
import json

import live
import numpy as np
import pytest
import torch
from head_check import check_depths
from heads_made import KINDS, built_head, random_head, written_texts
from live import speculate
from replayed import recorded, rows_of, walk, written
from safetensors.torch import load_file, save_file
from scipy import stats
from tiny import random_prompts, tiny_verifier

import calibration.trained.head_drafting as drafting
from calibration.common.errors import CalibrationError
from calibration.models.drafter import Read
from calibration.models.lane import generate
from calibration.models.sampling import distribution, generator_for
from calibration.recording.record import Request, record
from calibration.traces import DecodingInfo
from calibration.trained.shapes import HeadSettings, HeadShape
from calibration.training.head_train import train_head

CPU = torch.device("cpu")
GREEDY = DecodingInfo(mode="greedy")
SAMPLED = DecodingInfo(mode="sampled", temperature=0.8, top_p=0.9)
ENDS = frozenset({2, 40, 41})


@pytest.fixture(scope="module")
def random_heads(tiny, tmp_path_factory):
    """Heads that know nothing, and so try every path."""
    folder = tmp_path_factory.mktemp("random")
    return {kind: built_head(kind, tiny, random_head(kind, tiny, folder / kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def heads(tiny, tmp_path_factory):
    """Heads trained for a moment on greedy text of the verifier, which loops: they are often right."""
    folder = tmp_path_factory.mktemp("trained")
    texts = written_texts(tiny, 40, 24, GREEDY)
    settings = HeadSettings(tokens=4500, batch_tokens=240, bfloat16=False, learning_rate=5e-3, curve_tokens=10**6)
    shape = {"medusa": 4, "eagle": 3, "block": 5}
    for kind in KINDS:
        train_head(kind, tiny, HeadShape(tokens=shape[kind]), texts, texts[:2], GREEDY, settings, folder / kind)
    return {kind: built_head(kind, tiny, folder / kind) for kind in KINDS}


def read_of(verifier, prompt, output, decoding):
    ids = torch.tensor([[*prompt, *output][:-1]])
    states = verifier.model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    return Read(verifier.model, tuple(prompt), tuple(output), decoding, {"norm": states}, {})


# A reference without cache, packing or branches, from the saved tensors alone.


def rms(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def turned(x, positions, base):
    """Rotary positions by complex numbers; x [tokens, heads, d]."""
    half = x.shape[-1] // 2
    angle = positions[:, None].double() * base ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([z.real, z.imag], -1)


def layer(t, name, shape, context, x, positions, mask):
    """One decoder layer for the last len(x) tokens of `context` (which ends with x); mask [len(x), len(context)]."""
    h, g, d, base = shape["heads"], shape["kv_heads"], shape["head_dim"], shape["rope_base"]
    normed = rms(context, t[f"{name}attention_norm.weight"])
    q = (normed[-len(x) :] @ t[f"{name}query.weight"].T).view(len(x), h, d)
    k = (normed @ t[f"{name}key.weight"].T).view(len(context), g, d)
    v = (normed @ t[f"{name}value.weight"].T).view(len(context), g, d)
    q, k = turned(q, positions[-len(x) :], base), turned(k, positions, base)
    mixed = torch.zeros(len(x), h, d, dtype=x.dtype)
    for head in range(h):
        scores = q[:, head] @ k[:, head // (h // g)].T / d**0.5
        mixed[:, head] = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, head // (h // g)]
    x = x + mixed.reshape(len(x), -1) @ t[f"{name}out.weight"].T
    normed = rms(x, t[f"{name}mlp_norm.weight"])
    gate = normed @ t[f"{name}gate.weight"].T
    return x + (gate * torch.sigmoid(gate) * (normed @ t[f"{name}up.weight"].T)) @ t[f"{name}down.weight"].T


def fused(t, features, embedded):
    pair = [rms(features, t["fuse.feature_norm.weight"]), rms(embedded, t["fuse.token_norm.weight"])]
    return torch.cat(pair, -1) @ t["fuse.mix.weight"].T


def reference(verifier, folder, states, text, depth, follow=None):
    """Logits of `depth` drafts after `text` (prompt and output so far), going on with `follow` or greedily."""
    about = json.loads((folder / "drafter.json").read_text())
    t = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    embed, shape = verifier.model.get_input_embeddings().weight, about["settings"]
    features, tokens = states[: len(text) - 1], torch.tensor(text[1:])
    found = []
    if about["kind"] == "medusa":
        for k in range(depth):
            x = features[-1]
            for block in range(shape["layers"]):
                y = t["weight"][block, k] @ x + t["bias"][block, k]
                x = x + y * torch.sigmoid(y)
            found.append(x)
    elif about["kind"] == "block":
        pairs, count = fused(t, features, embed[tokens]), shape["tokens"]
        x = pairs[-1] + t["queries"]
        positions = torch.arange(len(pairs) + count)
        mask = torch.ones(count, len(positions), dtype=torch.bool)
        for number in range(shape["layers"]):
            x = layer(t, f"layers.{number}.", shape, torch.cat([pairs, x]), x, positions, mask)
        found = list(rms(x, t["norm.weight"])[:depth])
    else:
        for step in range(depth):
            pairs = fused(t, features, embed[tokens])
            mask = torch.ones(len(pairs), len(pairs), dtype=torch.bool).tril()
            out = layer(t, "layer.", shape, pairs, pairs, torch.arange(len(pairs)), mask)
            found.append(rms(out[-1], t["norm.weight"]))
            token = int((embed @ found[-1]).argmax()) if follow is None else follow[step]
            features, tokens = torch.cat([features, found[-1][None]]), torch.tensor([*tokens.tolist(), token])
    return torch.stack(found) @ embed.T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt_tokens", "chunk"), [(1, 256), (2, 3), (5, 5)])
def test_packed_drafts_are_those_of_the_plain_reference(tiny, tmp_path, kind, prompt_tokens, chunk, monkeypatch):
    monkeypatch.setattr(drafting, "CHUNK", chunk)
    folder = random_head(kind, tiny, tmp_path / "head")
    drafter = built_head(kind, tiny, folder)
    ids = random_prompts(4, 1, 14 + prompt_tokens, 14 + prompt_tokens)[0]
    prompt, output = ids[:prompt_tokens], ids[prompt_tokens:]
    read = read_of(tiny, prompt, output, SAMPLED)
    with torch.inference_mode():
        greedy = drafter.drafts(read_of(tiny, prompt, output, GREEDY), 4, generator_for(CPU, 0))
        sampled = drafter.drafts(read, 4, generator_for(CPU, 0))
    assert greedy.accept is None
    p = read.verifier_p.numpy()
    for t in range(len(output)):
        text = ids[: prompt_tokens + t]
        if len(text) < 2:
            assert (greedy.tokens[t] == -1).all()
            assert np.isnan(greedy.confidence[t]).all()
            continue
        logits = reference(tiny, folder, read.states["norm"], text, 4)
        assert greedy.tokens[t].tolist() == logits.argmax(-1).tolist()
        q = logits.softmax(-1)
        assert greedy.confidence[t] == pytest.approx(q.amax(-1).numpy(), abs=1e-5)
        assert greedy.entropy[t] == pytest.approx(torch.special.entr(q).sum(-1).numpy(), abs=1e-4)
        assert greedy.rank[t] == int((logits[0] > logits[0, output[t]]).sum())
        forced = [*output[t:], 0, 0, 0][:4]
        q = distribution(reference(tiny, folder, read.states["norm"], text, 4, forced), 0.8, 0.9).numpy()
        assert sampled.overlap[t] == pytest.approx(np.minimum(p[t], q[0]).sum(), abs=1e-5)
        for j in range(4):
            if t + j >= len(output):
                assert np.isnan(sampled.accept[t, j])
                continue
            token = output[t + j]
            wanted = min(1.0, q[j, token] / p[t + j, token]) if p[t + j, token] else float(q[j, token] > 0)
            assert sampled.accept[t, j] == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_depth_check_compares_packed_and_step_by_step(tiny, random_heads, kind):
    ids = random_prompts(5, 1, 20, 20)[0]
    read = read_of(tiny, ids[:3], ids[3:], GREEDY)
    checks = check_depths(random_heads[kind], read, 4, [0, 1, 5, 16])
    assert [(c.depth, c.starts, c.agreeing) for c in checks] == [(d, 4, 4) for d in (1, 2, 3, 4)]
    assert max(c.difference for c in checks) < 1e-9
    with pytest.raises(CalibrationError, match=r"start: must lie in \[0, 16\], got 17"):
        check_depths(random_heads[kind], read, 4, [17])


def test_a_trained_eagle_head_drafts_packed_what_it_drafts_step_by_step(tiny, heads):
    """From every start of the verifier's own text, twice as deep as the head was trained for."""
    text = written_texts(tiny, 1, 20, GREEDY, seed=8, low=3)[0]
    count = len(text.output_ids)
    read = read_of(tiny, text.prompt_ids, text.output_ids, GREEDY)
    checks = check_depths(heads["eagle"], read, 6, range(count))
    assert [(c.depth, c.starts, c.agreeing) for c in checks] == [(d, count, count) for d in range(1, 7)]
    assert max(c.difference for c in checks) < 1e-9


def test_the_depth_check_notices_a_branch_that_sees_too_much(tiny, random_heads, monkeypatch):
    ids = random_prompts(5, 1, 20, 20)[0]
    read = read_of(tiny, ids[:3], ids[3:], GREEDY)
    honest = drafting.Past.branches

    def leaking(past, last):
        found = honest(past, last)
        return type(found)(torch.ones_like(found.visible), found.position, found.state)

    monkeypatch.setattr(drafting.Past, "branches", leaking)
    checks = check_depths(random_heads["eagle"], read, 4, [0, 1, 5])
    assert checks[0].difference < 1e-9  # the first draft is made by the pass over the text
    assert checks[1].difference > 1e-3


# Live against replay.


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rounds_are_those_of_the_replay(tiny, heads, kind):
    prompts = random_prompts(15, 8, low=1, high=6)
    assert {1, 2} <= {len(prompt) for prompt in prompts}
    outputs = written(tiny, GREEDY, prompts, 30)
    trace = recorded(tiny, [heads[kind]], prompts, outputs, GREEDY, stride=4)
    accepted = []
    for gamma in (1, 2, 4, 8):
        runs = speculate(
            tiny.model,
            heads[kind],
            prompts,
            gamma=gamma,
            decoding=GREEDY,
            max_new_tokens=30,
            end_ids=ENDS,
            generator=generator_for(CPU, 0),
        )
        for row, (run, output) in enumerate(zip(runs, outputs, strict=True)):
            assert run.ids == output.ids
            assert run.rounds == walk(rows_of(trace.positions, f"r{row}", heads[kind].name), gamma)
            accepted += [r.accepted for r in run.rounds]
    assert {0, 1, 2} <= set(accepted)


# The text of the live loop, on a vocabulary of 7, so that every continuation of three tokens can be enumerated.
SMALL, HORIZON, ROWS = 7, 3, 2500


@pytest.fixture(scope="module")
def small():
    return tiny_verifier(5, vocabulary=SMALL, spread=0.35)


def p_value(small, drafter):
    prompt = [6, 5, 4]
    runs = speculate(
        small.model,
        drafter,
        [prompt] * ROWS,
        gamma=2,
        decoding=SAMPLED,
        max_new_tokens=HORIZON,
        end_ids=frozenset(),
        generator=generator_for(CPU, 1),
    )
    texts = list(itertools.product(range(SMALL), repeat=HORIZON))
    tokens = torch.tensor([[*prompt, *text] for text in texts])
    logits = small.model(input_ids=tokens, use_cache=False).logits[:, len(prompt) - 1 : -1]
    p = distribution(logits, SAMPLED.temperature, SAMPLED.top_p).double()
    chances = p.gather(-1, tokens[:, len(prompt) :, None]).prod(1)[:, 0]
    table = dict(zip(texts, chances.tolist(), strict=True))
    assert sum(table.values()) == pytest.approx(1.0, abs=1e-5)
    seen = dict.fromkeys(table, 0)
    for run in runs:
        seen[run.ids] += 1
    big = [text for text, p in table.items() if p * ROWS >= 8]
    observed, expected = [seen[text] for text in big], [table[text] * ROWS for text in big]
    return stats.chisquare([*observed, ROWS - sum(observed)], [*expected, ROWS - sum(expected)]).pvalue


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_text_is_distributed_as_the_verifiers_own(small, tmp_path, kind):
    drafter = built_head(kind, small, random_head(kind, small, tmp_path / kind, size=0.05))
    assert p_value(small, drafter) > 1e-3


def test_a_missing_residual_would_be_noticed(small, tmp_path, monkeypatch):
    drafter = built_head("eagle", small, random_head("eagle", small, tmp_path / "eagle", size=0.05))
    monkeypatch.setattr(live, "residual", lambda p, q: p)
    assert p_value(small, drafter) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_acceptance_given_the_live_text(small, tmp_path, kind):
    """Given the text, a draft is accepted with the probability recorded for its start and depth: a martingale."""
    gamma = 3
    drafter = built_head(kind, small, random_head(kind, small, tmp_path / kind, size=0.05))
    prompts = random_prompts(2, 40, low=1, high=6, vocabulary=SMALL)
    runs = speculate(
        small.model,
        drafter,
        prompts,
        gamma=gamma,
        decoding=SAMPLED,
        max_new_tokens=30,
        end_ids=frozenset(),
        generator=generator_for(CPU, 4),
    )
    total = np.zeros((3, gamma))
    for prompt, run in zip(prompts, runs, strict=True):
        with torch.inference_mode():
            read = read_of(small, prompt, run.ids, SAMPLED)
            accept = drafter.drafts(read, gamma, generator_for(CPU, 0)).accept
        for r in run.rounds:
            for depth in range(min(r.accepted + 1, gamma, len(run.ids) - r.start)):
                a = float(accept[r.start, depth])
                total[:, depth] += (depth < r.accepted) - a, a * (1 - a), 1
    assert (total[2] > 30).all()
    assert (total[1] > 5).all()
    assert (np.abs(total[0]) < 3 * np.sqrt(total[1])).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampled_recording_keeps_the_acceptance_and_one_draw_of_it(small, tmp_path, kind):
    drafter = built_head(kind, small, random_head(kind, small, tmp_path / kind, size=0.05))
    prompts = random_prompts(2, 12, low=1, high=6, vocabulary=SMALL)
    outputs = generate(small.model, prompts, SAMPLED, 30, frozenset(), generator_for(CPU, 0))
    requests = [Request(f"r{i}", "chat", tuple(p)) for i, p in enumerate(prompts)]
    columns = record(
        small.model, [drafter], requests, outputs, SAMPLED, generator_for(CPU, 0), gamma_max=3, rollout_stride=5
    ).positions
    chances, hits = [], []
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        with torch.inference_mode():
            accept = drafter.drafts(read_of(small, prompt, output.ids, SAMPLED), 3, generator_for(CPU, 1)).accept[
                :, 0
            ]
        pick = [i for i, name in enumerate(columns["sequence_id"]) if name == f"r{row}"]
        for t, i in enumerate(pick):
            if len(prompt) + t < 2:
                assert columns["proposal_length"][i] == columns["run_length"][i] == 0
                assert columns["accept_probability"][i] is None
                continue
            assert columns["accept_probability"][i] == pytest.approx(accept[t], abs=1e-5)
            assert columns["run_length"][i] <= min(drafter.info.max_draft_tokens, len(output.ids) - t)
            chances.append(float(accept[t]))
            hits.append(columns["run_length"][i] > 0)
    p = np.array(chances)
    assert 0.05 < p.mean() < 0.95
    assert abs(np.sum(hits) - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())


# What a drafter is made of.


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_counts_a_heads_own_tensors(tiny, random_heads, tmp_path, kind):
    folder = random_head(kind, tiny, tmp_path / "head")
    info = random_heads[kind].info
    tensors = load_file(folder / "model.safetensors")
    assert info.parameters == info.parameters_non_embedding == sum(t.numel() for t in tensors.values())
    hidden = 32
    if kind == "medusa":
        assert info.parameters == 2 * 4 * (hidden * hidden + hidden)
    assert info.paradigm == {"medusa": "medusa", "eagle": "eagle", "block": "block-head"}[kind]
    assert info.max_draft_tokens == {"medusa": 4, "eagle": 8, "block": 5}[kind]
    assert (info.hidden_size, info.vocabulary, info.deterministic) == (hidden, 97, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_can_be_timed(random_heads, kind):
    run = random_heads[kind].step(3, 20, generator_for(CPU, 0))
    assert all(seconds > 0 for seconds in (run(), run()))
    assert random_heads[kind].step(1, 0, generator_for(CPU, 0))() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_loaded_again_drafts_the_same(tiny, tmp_path, kind):
    ids = random_prompts(6, 1, 16, 16)[0]
    read = read_of(tiny, ids[:4], ids[4:], GREEDY)
    with torch.inference_mode():
        one, two, other = (
            built_head(kind, tiny, random_head(kind, tiny, tmp_path / name, seed)).drafts(
                read, 4, generator_for(CPU, 0)
            )
            for name, seed in (("a", 1), ("a", 1), ("b", 2))
        )
    assert (one.tokens == two.tokens).all()
    assert (one.confidence == two.confidence).all()
    assert (one.tokens != other.tokens).any()


def test_a_head_for_another_verifier_or_of_another_kind_is_refused(tiny, tmp_path):
    folder = random_head("medusa", tiny, tmp_path / "head")
    with pytest.raises(CalibrationError, match=r"trained for a verifier with vocabulary = 97, got 7"):
        built_head("medusa", tiny_verifier(5, vocabulary=7), folder)
    with pytest.raises(CalibrationError, match=r"must hold a drafter of kind 'eagle', got 'medusa'"):
        built_head("eagle", tiny, folder)
    with pytest.raises(CalibrationError, match=r"must be a trained drafter"):
        built_head("block", tiny, tmp_path / "nothing")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_make_a_head_are_refused(tiny, tmp_path, kind):
    folder = random_head(kind, tiny, tmp_path / "head")
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name][..., :3].contiguous()}, folder / "model.safetensors")
    with pytest.raises(CalibrationError, match=rf"tensor '{name}' must have the shape .* got .*3$"):
        built_head(kind, tiny, folder)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(CalibrationError, match=rf"tensor '{name}' must have the shape .* got none"):
        built_head(kind, tiny, folder)


def test_drafts_do_not_depend_on_how_many_are_asked_for(tiny, random_heads):
    ids = random_prompts(7, 1, 16, 16)[0]
    read = read_of(tiny, ids[:4], ids[4:], GREEDY)
    for drafter in random_heads.values():
        with torch.inference_mode():
            few, many = (drafter.drafts(read, depth, generator_for(CPU, 0)).tokens for depth in (2, 4))
        assert (few == many[:, :2]).all()
