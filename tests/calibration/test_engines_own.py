"""Our engine: the text of plain generation, the rounds of a replay, the iterations of the simulated engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Round
from replayed import GREEDY, recorded, rows_of, walk
from scenarios import scenario, traces_of
from tiny import random_prompts, tiny_llama, tiny_tokenizer, tiny_verifier

from calibration.common.errors import CalibrationError
from calibration.drafters import Distilled, EarlyExit, Standalone, Trigram, Windowed, build_drafter, parse_drafter
from calibration.drafters.standalone import standalone_drafter
from calibration.engines.drive import EngineRequest
from calibration.engines.own.drafting import DraftLengths
from calibration.engines.own.engine import OwnEngine
from calibration.models.lane import generate
from calibration.models.load import make_verifier
from calibration.models.sampling import generator_for
from calibration.trained.folder import save_drafter
from calibration.trained.shapes import StudentShape
from calibration.trained.trainees import make_trainee
from simulator import simulate

KINDS = ("paged", "padded")
DRAFTERS = ("prompt-lookup", "exit-2", "skip-1-2", "noisy", "student")
TOKENS = 30
PROMPTS = random_prompts(11, 7)


def plain(verifier, prompts=PROMPTS, tokens=TOKENS):
    """What the verifier writes by itself."""
    outputs = generate(verifier.model, prompts, GREEDY, tokens, frozenset(), generator_for(verifier.device, 0))
    return [output.ids for output in outputs]


@pytest.fixture(scope="module")
def drafters(tiny, tmp_path_factory):
    """One drafter of every kind: proposer, shared layers, own cache with old weights, with its own, trained."""
    named = {name: build_drafter(parse_drafter(name), tiny) for name in DRAFTERS[:3]}
    model, noise = tiny_llama(1), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight += 0.03 * torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
    named["noisy"] = standalone_drafter(Standalone(model="noisy"), model, tiny_tokenizer(), tiny)
    made = make_trainee(tiny, StudentShape(from_layers=(0, 1, 3)), generator_for(tiny.device, 0), torch.float64)
    with torch.no_grad():  # untrained norms are small: at full size drafts agree more often
        made.model.model.norm.weight.copy_(tiny.model.model.norm.weight)
    folder = tmp_path_factory.mktemp("drafters") / "student"
    about = {"shape": StudentShape(from_layers=(0, 1, 3)).model_dump(exclude_none=True)}
    save_drafter(folder, made.kind, about, tiny.info, made.weights, {"seed": 0})
    named["student"] = build_drafter(Distilled(path=str(folder)), tiny)
    return named


@pytest.fixture(scope="module")
def texts(tiny):
    return plain(tiny)


@pytest.fixture(scope="module")
def positions(tiny, drafters, texts):
    """What a recording says of every drafter on these texts."""
    outputs = [type("Output", (), {"ids": ids, "finish_reason": "length"}) for ids in texts]
    return recorded(tiny, list(drafters.values()), PROMPTS, outputs, GREEDY).positions


def serve(engine, requests, turns=None):
    """Serve (prompt, output tokens); request i comes before step turns[i]. Give texts, rounds and steps."""
    texts = [[] for _ in requests]
    rounds = [[] for _ in requests]
    steps, coming = [], list(range(len(requests)))
    while coming or engine.busy:
        while coming and (turns is None or turns[coming[0]] <= len(steps) or not engine.busy):
            engine.submit(EngineRequest(coming[0], *requests[coming.pop(0)]))
        step = engine.step()
        for i, tokens in step.received.items():
            if step.drafted_tokens is not None and i in step.drafted_tokens:
                rounds[i].append(Round(len(texts[i]), step.drafted_tokens[i], step.accepted_tokens[i], len(tokens)))
            texts[i].extend(tokens)
        steps.append(step)
    return [tuple(text) for text in texts], [tuple(row) for row in rounds], steps


# --- Text and rounds


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(("slots", "gamma"), [(2, 4), (8, 2)])
def test_text_is_the_verifiers_and_rounds_are_those_of_the_replay(
    tiny, drafters, texts, positions, kv, name, slots, gamma
):
    engine = OwnEngine(
        tiny, max_num_seqs=slots, drafter=drafters[name], draft_tokens=gamma, kv=kv, block_size=4, max_model_len=48
    )
    turns = [0, 0, 1, 5, 5, 9, 20]
    got, rounds, steps = serve(engine, [(prompt, TOKENS) for prompt in PROMPTS], turns)
    assert got == texts
    label = drafters[name].name
    assert rounds == [walk(rows_of(positions, f"r{i}", label), gamma) for i in range(len(PROMPTS))]
    assert sum(r.accepted for row in rounds for r in row) > 0
    assert max(step.sequences for step in steps) == min(slots, 7)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kv", KINDS)
def test_plain_text_whatever_else_is_in_the_batch(kv, dtype):
    verifier = tiny_verifier(1, dtype=dtype)
    wanted = plain(verifier)
    counts = [5, 30, 12, 1, 30, 2, 17]
    for slots in (1, 3, 8):
        engine = OwnEngine(verifier, max_num_seqs=slots, kv=kv)
        got, _, steps = serve(engine, list(zip(PROMPTS, counts, strict=True)), [0, 0, 2, 2, 4, 9, 9])
        assert got == [ids[:count] for ids, count in zip(wanted, counts, strict=True)]
        assert {step.drafted_tokens for step in steps} == {None}


@st.composite
def loads(draw):
    """Requests with lengths and arrivals, and settings of an engine."""
    slots = draw(st.integers(1, 4))
    requests = draw(
        st.lists(st.tuples(st.integers(0, 6), st.integers(1, TOKENS), st.integers(0, 25)), min_size=1, max_size=8)
    )
    chunked = draw(st.booleans())
    return {
        "requests": sorted(requests, key=lambda request: request[2]),
        "name": draw(st.sampled_from([None, *DRAFTERS])),
        "settings": {
            "max_num_seqs": slots,
            "kv": draw(st.sampled_from(KINDS)),
            "block_size": draw(st.sampled_from([1, 3, 16])),
            "max_model_len": 42,
            "enable_chunked_prefill": chunked,
            "max_num_batched_tokens": draw(st.integers(slots, 14) if chunked else st.sampled_from([None, 12, 30])),
            "long_prefill_token_threshold": draw(st.sampled_from([None, 3])) if chunked else None,
        },
        "draft_tokens": draw(st.sampled_from([1, 3, [(1, 1, 4), (2, 2, 0), (3, 9, 2)]])),
    }


@settings(max_examples=40)
@given(loads())
def test_whatever_the_load_texts_are_right_tokens_add_up_and_memory_comes_back(tiny, drafters, texts, load):
    options = dict(load["settings"])
    if load["name"]:
        options |= {"drafter": drafters[load["name"]], "draft_tokens": load["draft_tokens"]}
    engine = OwnEngine(tiny, **options)
    requests = [(PROMPTS[which], count) for which, count, _ in load["requests"]]
    got, _, steps = serve(engine, requests, [turn for _, _, turn in load["requests"]])
    assert got == [texts[which][:count] for which, count, _ in load["requests"]]
    assert sum(step.prefill_tokens for step in steps) == sum(len(prompt) for prompt, _ in requests)
    assert sum(step.new_tokens - step.sequences for step in steps) == sum(
        sum((step.drafted_tokens or {}).values()) for step in steps
    )
    caches = [engine._cache, getattr(engine._drafting, "_cache", engine._cache)]
    for cache in caches:
        assert not cache._lengths
        held = cache.rows if options["kv"] == "padded" else cache.blocks.tables
        assert len(held) == 0
        if options["kv"] == "paged":
            assert cache.blocks.free * cache.blocks.size == len(cache.layers[0])
    budget = options["max_num_batched_tokens"]
    if budget is not None:
        assert all(step.prefill_tokens <= budget for step in steps)


# --- The simulated engine does the same iterations


CASES = {
    "plain": ({}, None, {"policy": "none"}),
    "lookup": ({"max_num_batched_tokens": 14}, "prompt-lookup", {"policy": "fixed", "draft_tokens": 4}),
    "chunked": (
        {"max_num_batched_tokens": 16, "enable_chunked_prefill": True, "long_prefill_token_threshold": 5},
        "noisy",
        {"policy": "fixed", "draft_tokens": 3},
    ),
    "by batch": ({}, "exit-2", {"policy": "by_batch", "table": [[1, 1, 6], [2, 2, 0], [3, 4, 2]]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [None, 23])
def test_iterations_are_those_that_the_simulated_engine_predicts(tiny, drafters, texts, positions, case, length):
    """Same requests at the same moments of its clock: every iteration has the same kind and the same tokens."""
    keys, name, stopping = CASES[case]
    rows = [rows_of(positions, f"r{i}", name or "exit-2") for i in range(len(PROMPTS))]
    proposals = [row["proposal_length"] for row in rows] if name == "prompt-lookup" else None
    traces = traces_of(
        [row["run_length"] for row in rows], prompts=[len(prompt) for prompt in PROMPTS], proposals=proposals
    )
    workload = {"kind": "poisson", "rate_rps": 1.5, "requests": 14}
    if length is not None:
        workload["lengths"] = {"kind": "drawn", "output": {"kind": "constant", "tokens": length}}
    engine_keys = {"max_num_seqs": 3, **keys}
    predicted = simulate(scenario(workload=workload, engine=engine_keys, stopping=stopping), traces)
    plan, iterations = predicted.requests.to_pylist(), predicted.iterations.to_pylist()

    drafter = {}
    if name is not None:
        drafter = {"drafter": drafters[name], "draft_tokens": stopping.get("draft_tokens", stopping.get("table"))}
    engine = OwnEngine(tiny, **engine_keys, **drafter)
    starts = np.array([row["start_s"] for row in iterations])
    turns = [int(np.searchsorted(starts, row["arrival_s"])) for row in plan]
    requests = [(PROMPTS[int(row["sequence_id"].split("-")[1])], row["output_tokens"]) for row in plan]
    _, _, steps = serve(engine, requests, turns)
    assert len(steps) == len(iterations) > 30
    for step, row in zip(steps, iterations, strict=True):
        assert step.operation == row["kind"]
        assert step.sequences + step.prefill_sequences == row["active"]
        assert sum((step.drafted_tokens or {}).values()) == row["drafted_tokens"]
        assert sum((step.accepted_tokens or {}).values()) == row["accepted_tokens"]
        assert sum(len(tokens) for tokens in step.received.values()) == row["emitted_tokens"]
        assert step.prefill_tokens == row["prefill_tokens"]
        # There, the last received token counts as context; here it is new, as it is in no cache yet.
        assert step.context_tokens + step.sequences + step.prefill_context_tokens == row["context_tokens"]


# --- What a step tells


def test_a_drafter_of_the_verifiers_first_layers_feeds_one_token_a_step_and_has_no_prefill(tiny, drafters):
    engine = OwnEngine(tiny, max_num_seqs=2, drafter=drafters["exit-2"], draft_tokens=3)
    _, _, steps = serve(engine, [(PROMPTS[0], 9), (PROMPTS[1], 9)])
    assert steps[0].operation == "prefill"
    assert steps[0].drafts == ()
    for step in steps[1:]:
        n, before = step.sequences, step.context_tokens
        assert [d[:4] for d in step.drafts] == [("exit-2", n, n, before + j * n) for j in range(3)]
        assert all(d.cpu_s > 0 and d.wall_s > 0 for d in step.drafts)


def test_a_drafter_with_a_cache_of_its_own_reads_prompts_and_what_it_missed(tiny, drafters):
    engine = OwnEngine(tiny, max_num_seqs=2, drafter=drafters["noisy"], draft_tokens=2)
    _, rounds, steps = serve(engine, [(PROMPTS[0], TOKENS)])
    assert [d[:4] for d in steps[0].drafts] == [("noisy", 1, len(PROMPTS[0]), 0)]
    missed = 0
    for step, round_ in zip(steps[1:], rounds[0], strict=True):
        first, second = step.drafts
        assert first[:4] == ("noisy", 1, 1 + missed, step.context_tokens - missed)
        assert second[:4] == ("noisy", 1, 1, step.context_tokens + 1)
        missed = int(round_.accepted == 2)  # the last draft itself was not fed
    assert any(round_.accepted == 2 for round_ in rounds[0])


def test_a_lookup_is_one_draft_step_a_round_and_none_where_nothing_is_asked(tiny, drafters):
    table = [(1, 1, 0), (2, 2, 5)]
    engine = OwnEngine(tiny, max_num_seqs=2, drafter=drafters["prompt-lookup"], draft_tokens=table)
    _, _, steps = serve(engine, [(PROMPTS[0], 4), (PROMPTS[1], 12)])
    for step in steps[1:]:
        text = step.context_tokens + step.sequences
        assert [d[:4] for d in step.drafts] == ([("prompt-lookup", 2, 2, text)] if step.sequences == 2 else [])
    assert {step.sequences for step in steps} == {0, 1, 2}


def test_an_engine_says_what_it_is(tiny, drafters):
    engine = OwnEngine(tiny, max_num_seqs=4, drafter=drafters["exit-2"], draft_tokens=[(1, 2, 3), (3, 4, 1)])
    assert (engine.model, engine.device.kind, engine.info.name) == ("tiny", "cpu", "paceline")
    assert engine.info.settings["draft_tokens"] == "[[1, 2, 3], [3, 4, 1]]"
    assert (engine.info.settings["kv"], engine.info.settings["dtype"]) == ("paged", "float64")
    assert "max_num_batched_tokens" not in engine.info.settings
    engine.submit(EngineRequest(3, [5], 2))
    engine.close()
    assert not engine.busy


# --- Refusals


BAD_SETTINGS = [
    ({"draft_tokens": 2}, "draft_tokens: must be above 0 somewhere exactly where there is a drafter, got 2 and no"),
    ({"draft_tokens": [(1, 2, 1), (4, 5, 1)]}, r"follow each other from 1 on, K >= 0, got \[\[1, 2, 1\], \[4"),
    ({"draft_tokens": -1}, "draft_tokens: must be at least 0, or ranges .* got -1"),
    ({"kv": "pagd"}, "kv: not known, got 'pagd'; did you mean 'paged'?"),
    ({"block_size": 0}, "block_size: must be at least 1, got 0"),
    ({"max_num_seqs": 0}, "max_num_seqs: must be at least 1, got 0"),
    ({"enable_chunked_prefill": True}, "max_num_batched_tokens: must be given where enable_chunked_prefill is"),
    ({"long_prefill_token_threshold": 4}, "long_prefill_token_threshold: needs enable_chunked_prefill"),
    ({"max_num_batched_tokens": 1}, "max_num_batched_tokens: must be at least max_num_seqs = 2, got 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SETTINGS)
def test_settings_that_cannot_be_are_refused(tiny, options, message):
    with pytest.raises(CalibrationError, match=message):
        OwnEngine(tiny, **{"max_num_seqs": 2, **options})


BAD_REQUESTS = [
    (EngineRequest(1, [], 3), "request 1: must have a prompt token and be given one to write, got 0 and 3"),
    (EngineRequest(1, [4], 0), "got 1 and 0"),
    (EngineRequest(1, [4, 97], 3), r"request 1: token ids must lie in \[0, 96\], got 97"),
    (EngineRequest(1, [4] * 8, 3), "must have at most max_model_len = 10 tokens, got 11"),
    (EngineRequest(1, [4] * 7, 1), "at most max_num_batched_tokens = 6 tokens without enable_chunked_prefill, got 7"),
    (EngineRequest(0, [4], 1), "request 0: must have an id that no other request in the engine has"),
]


@pytest.mark.parametrize(("request_", "message"), BAD_REQUESTS)
def test_requests_that_can_never_be_served_are_refused(tiny, request_, message):
    engine = OwnEngine(tiny, max_num_seqs=2, max_model_len=10, max_num_batched_tokens=6)
    engine.submit(EngineRequest(0, [4], 1))
    with pytest.raises(CalibrationError, match=message):
        engine.submit(request_)


def test_drafters_and_models_that_the_engine_does_not_run_are_refused(tiny):
    windowed = build_drafter(Windowed(drafter=EarlyExit(layers=2), sink=1, recent=8), tiny)
    with pytest.raises(CalibrationError, match="drafter 'exit-2-window-1-0-8': must be a causal LM without a window"):
        OwnEngine(tiny, max_num_seqs=1, drafter=windowed, draft_tokens=2)
    trees = OwnEngine(tiny, max_num_seqs=1, drafter=build_drafter(Trigram(), tiny), draft_tokens=2)
    trees.submit(EngineRequest(0, [5, 6, 5, 7, 5, 6, 5], 9))
    trees.step()
    with pytest.raises(CalibrationError, match="drafter 'trigram': must draft chains"):
        trees.step()
    other = make_verifier("other", tiny_llama(1), tiny_tokenizer())
    other.model.config.model_type = "llamma"
    with pytest.raises(CalibrationError, match=r"model_type must be .* got 'llamma'; did you mean 'llama'\?"):
        OwnEngine(other, max_num_seqs=1)
    mixed = make_verifier("mixed", tiny_llama(1), tiny_tokenizer())
    mixed.model.model.layers[1].float()
    with pytest.raises(CalibrationError, match="the embedding's dtype float64, got float32, float64"):
        OwnEngine(mixed, max_num_seqs=1)


def test_draft_lengths_by_batch_size_are_those_of_the_policy():
    from simulator.stopping.lengths import ByBatch

    table = [(1, 2, 5), (3, 6, 0), (7, 8, 2)]
    policy = ByBatch(table, 12)
    assert [DraftLengths(table).at(batch) for batch in range(1, 13)] == policy._by_size[1:]
    assert DraftLengths(table).longest == policy.longest_draft
    assert [DraftLengths(4).at(batch) for batch in (1, 9)] == [4, 4]


# --- The real model


@pytest.mark.model
def test_the_real_verifier_writes_the_same_text_with_and_without_speculation(smollm2):
    questions = ["Name the days of the week.", "What is 2 + 2?", "Say hello. Say hello. Say"]
    prompts = [smollm2.encode(text) for text in questions]
    wanted = plain(smollm2, prompts, 10)
    for kv, name, gamma in (("padded", None, 0), ("paged", "prompt-lookup", 4), ("paged", "exit-28", 2)):
        drafter = {"drafter": build_drafter(parse_drafter(name), smollm2), "draft_tokens": gamma} if name else {}
        engine = OwnEngine(smollm2, max_num_seqs=2, kv=kv, max_model_len=128, **drafter)
        got, rounds, _ = serve(engine, [(prompt, 10) for prompt in prompts])
        assert got == wanted
        assert not name or sum(r.accepted for row in rounds for r in row) > 0
