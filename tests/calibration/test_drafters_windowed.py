"""Drafters with few keys and values in sight: the window against plain recomputation, the memory block, the study."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from replayed import GREEDY, SAMPLED, live, recorded, rows_of, same_rounds, written
from tiny import random_prompts, tiny_verifier

import calibration.models.lane as lane_module
from calibration.common.errors import CalibrationError
from calibration.drafters import EarlyExit, Windowed, build_drafter
from calibration.drafters.memory_block import BLOCK, attention_received, choose_blocks
from calibration.jobs.long_context import WindowChoice, long_prompt, save_windows, window_study
from calibration.models.lane import Lane, generate, pad_left
from calibration.models.sampling import generator_for, processed
from calibration.recording.reading import run_lengths

CPU = torch.device("cpu")
CHOICES = [
    {"prefill": "window", "sink": 2, "recent": 5},
    {"prefill": "whole", "sink": 1, "recent": 4},
    {"prefill": "window", "sink": 0, "recent": 4, "memory": 3, "memory_queries": 3},
    {"prefill": "whole", "sink": 1, "recent": 3, "memory": 5, "memory_queries": 2, "memory_layer": 1},
]


def windowed(**changed):
    return Windowed(drafter=EarlyExit(layers=3), **changed)


def in_sight(choice, remembered, prompt_tokens, total):
    """What every token of a text may attend to, place by place [total, total]."""
    seen = np.zeros((total, total), dtype=bool)
    for i in range(total):
        for j in range(i + 1):
            near = i - j < choice["recent"] or j < choice["sink"] or j in remembered
            seen[i, j] = near or (choice["prefill"] == "whole" and i < prompt_tokens)
    return seen


def naive_logits(model, text, seen):
    """Logits of every position from one pass with an explicit mask, no cache."""
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(
        ~torch.as_tensor(seen), torch.finfo(model.dtype).min
    )
    out = model(input_ids=torch.tensor([text]), attention_mask=mask[None, None], use_cache=False)
    return out.logits[0]


def remembered(drafter, prompt):
    if drafter.window.memory is None:
        return set()
    return set(np.flatnonzero(drafter.window.memory([prompt])[0].numpy()).tolist())


@pytest.mark.parametrize("choice", CHOICES)
def test_the_reading_is_that_of_a_plain_pass_with_a_banded_mask(tiny, choice):
    drafter = windowed(**choice).build(tiny)
    prompts = random_prompts(4, 3, 8, 26)
    outputs = written(tiny, GREEDY, prompts, 20)
    recording = recorded(tiny, [drafter], prompts, outputs, GREEDY)
    kept = [remembered(drafter, prompt) for prompt in prompts]
    assert any(kept) == ("memory" in choice)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        text = [*prompt, *output.ids[:-1]]
        logits = naive_logits(drafter.model, text, in_sight(choice, kept[row], len(prompt), len(text)))
        q = processed(logits[len(prompt) - 1 :], GREEDY)
        rows = rows_of(recording.positions, f"r{row}", drafter.name)
        assert rows["drafter_confidence"] == pytest.approx(q.amax(-1).tolist(), abs=1e-6)
        match = (q.argmax(-1) == torch.tensor(output.ids)).numpy()
        assert rows["run_length"] == run_lengths(match).tolist()


def test_a_window_changes_what_the_drafter_says(tiny):
    whole, narrow = EarlyExit(layers=3).build(tiny), windowed(sink=0, recent=2).build(tiny)
    prompts = random_prompts(4, 3, 20, 26)
    outputs = written(tiny, GREEDY, prompts, 20)
    recording = recorded(tiny, [whole, narrow], prompts, outputs, GREEDY)
    a, b = (rows_of(recording.positions, "r0", d.name)["drafter_confidence"] for d in (whole, narrow))
    assert a[0] == pytest.approx(b[0], abs=1e-9)  # the last prompt token sees the whole prompt
    assert max(abs(x - y) for x, y in zip(a[1:], b[1:], strict=True)) > 0.01


@pytest.mark.parametrize("choice", CHOICES)
def test_live_rounds_are_those_of_the_replay(tiny, choice):
    assert same_rounds(tiny, windowed(**choice).build(tiny), tokens=20, rows=4) > 0


@pytest.mark.parametrize("choice", [CHOICES[0], CHOICES[3]])
def test_rollouts_see_the_same_window(tiny, choice):
    drafter = windowed(**choice).build(tiny)
    prompt = random_prompts(4, 1, 18, 18)[0]
    output = written(tiny, GREEDY, [prompt], 14)[0]
    recording = recorded(tiny, [drafter], [prompt], [output], GREEDY, gamma_max=4, stride=5)
    kept, steps = remembered(drafter, prompt), rows_of(recording.rollouts, "r0", drafter.name)
    for index, t in enumerate(range(0, len(output.ids), 5)):
        text = [*prompt, *output.ids[:t]]
        for step in range(4):
            seen = in_sight(choice, kept, len(prompt), len(text))
            logits = naive_logits(drafter.model, text, seen)[-1]
            sure = float(processed(logits, GREEDY).max())
            assert steps["drafter_confidence"][4 * index + step] == pytest.approx(sure, abs=1e-6)
            text.append(int(logits.argmax()))


def test_sampled_acceptance_by_depth_is_the_recorded_probability(tiny):
    drafter, gamma = windowed(**CHOICES[3]).build(tiny), 3
    prompts = random_prompts(2, 40, 8, 20)
    runs = live(tiny, drafter, prompts, gamma, SAMPLED, 40)
    recording = recorded(tiny, [drafter], prompts, runs, SAMPLED)
    total = np.zeros((3, gamma))
    for row, run in enumerate(runs):
        accept = rows_of(recording.positions, f"r{row}", drafter.name)["accept_probability"]
        for r in run.rounds:
            for depth in range(min(r.accepted + 1, gamma, len(run.ids) - r.start)):
                a = accept[r.start + depth]
                total[:, depth] += (depth < r.accepted) - a, a * (1 - a), 1
    assert total[2, 0] > 300
    assert (np.abs(total[0]) < 3.5 * np.sqrt(total[1])).all()


# The memory block.


def test_attention_received_is_that_of_whole_attention_maps(tiny):
    model = EarlyExit(layers=3).build(tiny).model
    prompt = random_prompts(0, 1, 30, 30)[0]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.config._attn_implementation = "eager"
    maps = model(input_ids=torch.tensor([prompt]), output_attentions=True, use_cache=False).attentions
    for config in (model.config, *(layer.self_attn.config for layer in model.model.layers)):
        config._attn_implementation = before
    wanted = torch.stack([a[0, :, -4:].sum((0, 1)) for a in maps]).float()
    torch.testing.assert_close(attention_received(model, prompt, 4, 1), wanted[1])
    torch.testing.assert_close(attention_received(model, prompt, 4, None), wanted.sum(0))
    assert model.config._attn_implementation == before
    short = attention_received(model, prompt[:3], 8, 0)
    assert short.shape == (3,)
    assert float(short.sum()) == pytest.approx(3 * 4, abs=1e-5)  # queries times heads


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(0, 6), st.integers(0, 60))
def test_blocks_of_most_mass_are_kept(seed, tokens, first, stop):
    mass = torch.as_tensor(np.random.default_rng(seed).random(60))
    kept = choose_blocks(mass, tokens, first, stop).numpy()
    candidates = max(stop - first, 0)
    assert not kept[:first].any()
    assert not kept[max(stop, first) :].any()
    assert kept.sum() == min(tokens, candidates) or kept.sum() >= min(tokens, candidates) - BLOCK
    sums = [(float(mass[b : min(b + BLOCK, stop)].sum()), b) for b in range(first, stop, BLOCK)]
    if sums:
        assert kept[max(sums)[1]]


def test_memory_is_a_function_of_the_prompt_alone_and_needs_long_ones(tiny):
    memory = windowed(sink=1, recent=4, memory=6, memory_queries=3).build(tiny).window.memory
    short, one, two = [5, 6, 7], *random_prompts(1, 2, 20, 24)
    together, alone = memory([short, one, two]), memory([two])
    assert not together[0].any()
    assert together[2, : len(two)].tolist() == alone[0].tolist()
    assert together[1].sum() == together[2].sum() == 6
    assert not together[1, len(one) - 4 :].any()


def test_a_draft_step_reads_what_is_held(tiny):
    window = windowed(sink=4, recent=64, memory=32).build(tiny).window
    assert [window.held(n) for n in (10, 100, 5000)] == [10, 100, 100]
    with pytest.raises(ValueError, match="needs them"):
        Lane(tiny.model, 1, window=window)


def test_settings_that_do_not_fit_are_refused(tiny):
    with pytest.raises(CalibrationError, match="memory_layer must be less than the drafter's 3 layers, got 3"):
        build_drafter(windowed(memory=4, memory_layer=3), tiny)
    with pytest.raises(CalibrationError, match="must have no window of its own"):
        build_drafter(Windowed(drafter=windowed()), tiny)
    info = windowed(memory=16).build(tiny).info
    assert info.name == "exit-3-window-4-16-512"
    assert info.settings["drafter"] == {"paradigm": "early-exit", "exit_layer": 3}
    assert info.settings["memory_layer"] is None


def test_long_columns_are_fed_in_pieces(tiny, monkeypatch):
    monkeypatch.setattr(lane_module, "PIECE", 7)
    prompts = random_prompts(3, 3, 5, 40)
    whole, pieces = (Lane(tiny.model, 3, taps=("norm", 1)) for _ in range(2))
    wanted = whole.feed(*pad_left(prompts, CPU))
    found = pieces.feed(*pad_left(prompts, CPU), last=3)
    torch.testing.assert_close(found, wanted[:, -3:])
    for tap in ("norm", 1):
        for a, b, real in zip(whole.tapped[tap], pieces.tapped[tap], whole.kept, strict=True):
            torch.testing.assert_close(b[real], a[real])
    assert torch.equal(whole.kept, pieces.kept)


# The study.


def test_the_study_measures_what_a_recording_does(tmp_path):
    verifier = tiny_verifier(1)
    drafter = EarlyExit(layers=3).build(verifier)
    prompts = {30: random_prompts(5, 2, 28, 30), 50: random_prompts(6, 2, 48, 50)}
    windows = [
        WindowChoice(),
        WindowChoice(1, 6),
        WindowChoice(1, 6, prefill="window"),
        WindowChoice(1, 6, 16),
        WindowChoice(2, 200),
    ]
    rows = window_study(verifier, drafter, prompts, windows, new_tokens=16, gamma=3, queries=4)
    assert [(r.context, r.recent) for r in rows] == [(c, w.recent) for c in prompts for w in windows]
    for row in rows:
        kind = drafter
        if row.recent is not None:
            told = {"sink": row.sink, "recent": row.recent, "memory": row.memory, "prefill": row.prefill}
            kind = windowed(**told, memory_queries=4).build(verifier)
        texts = [
            generate(verifier.model, [p], GREEDY, 16, verifier.end_ids, generator_for(CPU, 0))[0]
            for p in prompts[row.context]
        ]
        recording = recorded(verifier, [kind], prompts[row.context], texts, GREEDY)
        runs = [r for i in range(2) for r in rows_of(recording.positions, f"r{i}", kind.name)["run_length"][1:]]
        assert row.positions == len(runs)
        assert row.mean_run == pytest.approx(np.minimum(runs, 3).mean())
        assert row.token_match == pytest.approx(np.mean([r > 0 for r in runs]))
    assert [row.held_tokens for row in rows[5:]] == [50, 7, 7, 23, 50]
    save_windows(rows, tmp_path / "w.csv")
    with (tmp_path / "w.csv").open() as file:
        table = list(csv.DictReader(file))
    assert (table[0]["recent"], table[1]["recent"]) == ("", "6")
    assert float(table[7]["token_match"]) == rows[7].token_match


def test_long_prompts_fill_the_context(tiny):
    passages = ["one two three", "four five", "six"]
    prompt = long_prompt(tiny, passages, 200, np.random.default_rng(0))
    assert 150 < len(prompt) <= 200
    assert prompt == long_prompt(tiny, passages, 200, np.random.default_rng(0))
    with pytest.raises(CalibrationError, match="one must fit into 20 tokens"):
        long_prompt(tiny, passages, 20, np.random.default_rng(0))


def test_contexts_beyond_the_positions_of_the_verifier_are_refused(tiny):
    drafter = EarlyExit(layers=3).build(tiny)
    with pytest.raises(CalibrationError, match="2048 positions, got 2050"):
        window_study(tiny, drafter, {2040: [[5] * 2040]}, [WindowChoice()], new_tokens=10)


def test_a_step_is_timed_over_what_is_held(tiny, monkeypatch):
    import calibration.drafters.timing as loaded

    asked = []
    monkeypatch.setattr(loaded, "forward_step", lambda model, *sizes: asked.append(sizes) or (lambda: 0.5))
    noise = torch.Generator()
    assert windowed(sink=4, recent=20).build(tiny).step(2, 100, noise)() == 0.5
    EarlyExit(layers=3).build(tiny).step(2, 100, noise)
    assert asked == [(2, 1, 24), (2, 1, 100)]
