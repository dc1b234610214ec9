"""Drafters made of two, against their parts drafting alone one pass a token, and live against replay."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from replayed import CPU, GREEDY, SAMPLED, live, recorded, rows_of, same_rounds, written
from scipy import stats
from tiny import random_prompts, tiny_verifier

from calibration.common.errors import CalibrationError
from calibration.drafters import (
    AnyDrafter,
    DynamicExit,
    EarlyExit,
    MergedTrees,
    NgramBeforeModel,
    PromptLookup,
    RetrievalFused,
    Trigram,
    build_drafter,
    submodel,
)
from calibration.drafters.lanes import ModelDrafter, ModelSide
from calibration.models.load import Verifier
from calibration.models.sampling import distribution, generator_for
from calibration.proposers import make
from calibration.proposers.lookup import NgramIndex

LOOKUP, DEPTH = PromptLookup(ngram_max=2), 5
TREES = Trigram(nodes=14, branching=3, max_draft_tokens=DEPTH)
EXIT, DEEPER = EarlyExit(layers=2), EarlyExit(layers=3)
SWITCHED = DynamicExit(exits=(1, 2, 3), half_life=3.0, max_draft_tokens=DEPTH)

KINDS: dict[str, Any] = {
    "lookup before exit": NgramBeforeModel(first=LOOKUP, second=EXIT, least_tokens=3, max_draft_tokens=DEPTH),
    "trees before exit": NgramBeforeModel(first=TREES, second=DEEPER, least_tokens=2, max_draft_tokens=DEPTH),
    "lookup before dynamic": NgramBeforeModel(first=LOOKUP, second=SWITCHED, least_tokens=2, max_draft_tokens=DEPTH),
    "lookup before trees": NgramBeforeModel(first=LOOKUP, second=TREES, least_tokens=2, max_draft_tokens=DEPTH),
    "lookup and exit": MergedTrees(first=LOOKUP, second=DEEPER, max_draft_tokens=DEPTH),
    "exit and exit": MergedTrees(first=EXIT, second=DEEPER, max_draft_tokens=DEPTH),
    "trees and dynamic": MergedTrees(first=TREES, second=SWITCHED, max_draft_tokens=DEPTH),
    "exit or exit": MergedTrees(first=EXIT, second=DEEPER, choose="confidence", max_draft_tokens=DEPTH),
    "fused by token": RetrievalFused(first=TREES, second=DEEPER, top=20, max_draft_tokens=DEPTH),
    "fused by path": RetrievalFused(
        first=TREES, second=DEEPER, prune="path", min_probability=0.003, max_draft_tokens=DEPTH
    ),
}


def logits_after(model: Any, text: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]


Paths = set[tuple[int, ...]]


def beginnings(tokens: list[int]) -> Paths:
    return {tuple(tokens[: n + 1]) for n in range(len(tokens))}


def looked_up(text: list[int]) -> Paths:
    return beginnings(NgramIndex(text, ngram_max=2).propose(DEPTH))


def searched(text: list[int]) -> Paths:
    proposer = make(TREES.proposer())
    proposer.extend(text)
    draft = proposer.propose(DEPTH)
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents or (), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return set(paths)


def drafted(model: Any, text: list[int]) -> tuple[list[int], float]:
    """The model's greedy draft of full depth, and its mean confidence."""
    tokens: list[int] = []
    sure = []
    for _ in range(DEPTH):
        logits = logits_after(model, [*text, *tokens])
        tokens.append(int(logits.argmax()))
        sure.append(float(torch.softmax(logits, 0).max()))
    return tokens, sum(sure) / DEPTH


def naive(kind: str, models: dict[int, Any], text: list[int]) -> Paths:
    """What is proposed behind `text`: the paths of its nodes."""
    longest = {"lookup": 3, "trees": 2}
    if "before exit" in kind:
        word = kind.split()[0]
        first = looked_up(text) if word == "lookup" else searched(text)
        chain = drafted(models[2 if word == "lookup" else 3], text)[0]
        return first if max(map(len, first), default=0) >= longest[word] else beginnings(chain)
    if kind == "lookup before trees":
        first = looked_up(text)
        return first if max(map(len, first), default=0) >= 2 else searched(text)
    if kind == "lookup and exit":
        return looked_up(text) | beginnings(drafted(models[3], text)[0])
    both = [drafted(models[layers], text) for layers in (2, 3)]
    if kind == "exit and exit":
        return beginnings(both[0][0]) | beginnings(both[1][0])
    if kind == "exit or exit":
        return beginnings(both[0][0] if both[0][1] >= both[1][1] else both[1][0])
    return beginnings(both[1][0]) | pruned(kind, models[3], text, searched(text))


def pruned(kind: str, model: Any, text: list[int], paths: Paths) -> Paths:
    if kind == "fused by token":
        best = torch.softmax(logits_after(model, text), 0).topk(20).indices.tolist()
        return {path for path in paths if path[0] in best}
    kept = set()
    for path in paths:
        probability = 1.0
        for n, token in enumerate(path):
            probability *= float(torch.softmax(logits_after(model, [*text, *path[:n]]), 0)[token])
        if probability >= 0.003:
            kept.add(path)
    return kept


REFERENCED = [kind for kind in KINDS if "dynamic" not in kind]


@pytest.mark.parametrize("kind", REFERENCED)
def test_drafts_are_those_of_the_parts_one_pass_a_token(tiny: Verifier, kind: str) -> None:
    drafter = build_drafter(KINDS[kind], tiny)
    models = {n: submodel(tiny.model, tuple(range(n))) for n in (2, 3)}
    prompts = random_prompts(11, 6)[2:4]
    outputs = written(tiny, GREEDY, prompts, 22)
    got_trees = 0
    trace = recorded(tiny, [drafter], prompts, outputs, GREEDY, gamma_max=DEPTH)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        got = rows_of(trace.positions, f"r{row}", drafter.name)
        for t in range(len(output.ids)):
            paths = naive(kind, models, [*prompt, *output.ids[:t]])
            ahead = output.ids[t:]
            depth = max(map(len, paths), default=0)
            assert got["proposal_length"][t] == depth
            assert got["run_length"][t] == max((len(p) for p in paths if p == ahead[: len(p)]), default=0)
            nodes = [sum(len(path) <= level for path in paths) for level in range(1, depth + 1)]
            if got["proposal_nodes"][t] is None:
                assert nodes == list(range(1, depth + 1))
            else:
                assert got["proposal_nodes"][t] == nodes
                got_trees += nodes != list(range(1, depth + 1))
    assert (got_trees > 0) == (kind not in ("lookup before exit", "lookup before trees", "exit or exit"))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rounds_are_those_of_the_replay(tiny: Verifier, kind: str) -> None:
    assert same_rounds(tiny, build_drafter(KINDS[kind], tiny), rows=5, gammas=(1, 3, 8)) > 5


def test_merged_runs_are_the_better_of_both(tiny: Verifier) -> None:
    """At every start; and the union holds no more nodes than both, nor fewer than the larger."""
    parts = {spec.label: build_drafter(spec, tiny) for spec in (TREES, DEEPER, SWITCHED)}
    prompts = random_prompts(11, 6)
    outputs = written(tiny, GREEDY, prompts, 30)
    for first, second in itertools.combinations((TREES, DEEPER, SWITCHED), 2):
        both = build_drafter(MergedTrees(first=first, second=second, max_draft_tokens=DEPTH, name="both"), tiny)
        drafters = [both, parts[first.label], parts[second.label]]
        trace = recorded(tiny, drafters, prompts, outputs, GREEDY, gamma_max=DEPTH)
        for row in range(len(prompts)):
            merged, a, b = (rows_of(trace.positions, f"r{row}", d.name) for d in drafters)
            runs = [[min(n, DEPTH) for n in part["run_length"]] for part in (a, b)]
            assert merged["run_length"] == np.maximum(*runs).tolist()
            sizes = [total(part) for part in (a, b)]
            union = total(merged)
            assert (union >= np.maximum(*sizes)).all()
            assert (union <= np.add(*sizes)).all()


def total(part: dict[str, list[Any]]) -> np.ndarray:
    """Nodes of every draft."""
    rows = zip(part["proposal_nodes"], part["proposal_length"], strict=True)
    return np.array([DEPTH if n is None else n if nodes is None else ([0, *nodes])[-1] for nodes, n in rows])


def test_layers_count_the_models_part_alone(tiny: Verifier) -> None:
    """Tokens that were looked up take no layers; the model's take all of it, the dynamic exit's as many as it ran."""
    prompts = random_prompts(11, 4)
    outputs = written(tiny, GREEDY, prompts, 30)
    plain = build_drafter(KINDS["lookup before exit"], tiny)
    dynamic, alone = build_drafter(KINDS["lookup before dynamic"], tiny), build_drafter(SWITCHED, tiny)
    trace = recorded(tiny, [plain, dynamic, alone], prompts, outputs, GREEDY, gamma_max=DEPTH)
    seen = set()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        parts = [rows_of(trace.positions, f"r{row}", d.name)["draft_layers"] for d in (plain, dynamic, alone)]
        for t in range(len(output.ids)):
            found = len(NgramIndex([*prompt, *output.ids[:t]], ngram_max=2).propose(DEPTH))
            assert parts[0][t] == ([0] * found if found >= 3 else [2, 4, 6, 8, 10])
            assert parts[1][t] == ([0] * found if found >= 2 else parts[2][t])
            seen.add(found >= 3)
    assert seen == {True, False}


def test_a_side_that_did_not_draft_still_reads_what_was_emitted(tiny: Verifier) -> None:
    drafter = build_drafter(EXIT, tiny)
    assert isinstance(drafter, ModelDrafter)
    prompts, generator = random_prompts(2, 3), generator_for(CPU, 0)
    side = ModelSide(drafter, prompts, [5, 6, 7], GREEDY)
    texts = [[*prompt, token] for prompt, token in zip(prompts, (5, 6, 7), strict=True)]
    for emitted, asked in (
        ([[8], [9, 10], [11]], False),
        ([[12, 13], [14], [15, 16]], True),
        ([[3], [4], [5]], False),
    ):
        if asked:
            side.draft(2, generator)
        side.commit(emitted, {})
        texts = [text + new for text, new in zip(texts, emitted, strict=True)]
    tokens = side.draft(3, generator).tokens
    for row, text in enumerate(texts):
        for token in tokens[row].tolist():
            assert token == int(logits_after(drafter.model, text).argmax())
            text.append(token)


@pytest.mark.parametrize("second", [DEEPER, SWITCHED], ids=["exit", "dynamic"])
def test_sampled_rounds_are_draws_of_what_is_recorded_given_the_text(tiny: Verifier, second: Any) -> None:
    """Given tokens are accepted as the text says; the model's (drafted, accepted) have the recorded law."""
    spec = NgramBeforeModel(first=LOOKUP, second=second, least_tokens=3, max_draft_tokens=DEPTH, name="d")
    drafter, prompts = build_drafter(spec, tiny), random_prompts(2, 40)
    runs = live(tiny, drafter, prompts, DEPTH, SAMPLED, 40)
    trace = recorded(tiny, [drafter], prompts, runs, SAMPLED, gamma_max=DEPTH, seed=3)
    differences, given = [], 0
    for row, run in enumerate(runs):
        got = rows_of(trace.positions, f"r{row}", "d")
        for r in run.rounds:
            if r.start + DEPTH >= len(run.ids):
                continue
            pair = r.drafted - got["proposal_length"][r.start], r.accepted - got["run_length"][r.start]
            if got["draft_layers"][r.start][:1] == [0]:
                assert pair == (0, 0)
                assert got["drafter_confidence"][r.start] is None or np.isnan(got["drafter_confidence"][r.start])
                given += 1
            else:
                differences.append(pair)
    table = np.array(differences)
    assert given > 20
    assert len(table) > 300
    assert (table[:, 1] != 0).sum() > 50
    for column in table.T:
        assert abs(column.sum()) < 3.5 * np.sqrt((column**2).sum() + 1)


SMALL, HORIZON, ROWS = 7, 3, 4000
SAMPLED_KINDS = {
    "lookup before exit": NgramBeforeModel(first=LOOKUP, second=EarlyExit(layers=3), least_tokens=3),
    "given trees": MergedTrees(first=LOOKUP, second=Trigram(nodes=10, branching=3)),
}


@pytest.mark.parametrize("kind", SAMPLED_KINDS)
def test_sampled_text_is_distributed_as_the_verifiers_own(kind: str) -> None:
    small = tiny_verifier(5, vocabulary=SMALL, spread=0.35)
    prompt = [6, 5, 4, 3, 2, 1, 0]
    table = {}
    for text in itertools.product(range(SMALL), repeat=HORIZON):
        logits = small.model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
        p = distribution(logits[len(prompt) - 1 : -1], SAMPLED.temperature, SAMPLED.top_p)
        table[text] = float(np.prod([float(p[i, token]) for i, token in enumerate(text)]))
    drafter = build_drafter(SAMPLED_KINDS[kind], small)
    runs = live(small, drafter, [prompt] * ROWS, 3, SAMPLED, HORIZON, frozenset())
    seen = dict.fromkeys(table, 0)
    for run in runs:
        seen[run.ids] += 1
    big = [text for text, p in table.items() if p * ROWS >= 8]
    observed, expected = [seen[text] for text in big], [table[text] * ROWS for text in big]
    assert stats.chisquare([*observed, ROWS - sum(observed)], [*expected, ROWS - sum(expected)]).pvalue > 1e-3


def test_pairs_that_cannot_be_are_refused(tiny: Verifier) -> None:
    def refused(spec: Any, message: str) -> None:
        with pytest.raises(CalibrationError, match=message):
            build_drafter(spec, tiny)

    refused(NgramBeforeModel(first=EXIT, second=DEEPER), "first must propose given tokens .* got early-exit")
    refused(
        NgramBeforeModel(first=LOOKUP, second=PromptLookup()), "must have different names, got 'prompt-lookup' twice"
    )
    refused(MergedTrees(first=LOOKUP, second=EXIT, choose="confidence"), "'prompt-lookup' proposes given tokens")
    refused(RetrievalFused(first=EXIT, second=DEEPER), "first must propose given tokens, got early-exit")
    refused(RetrievalFused(first=LOOKUP, second=TREES), "second must be a causal LM .* got trigram")


@pytest.mark.parametrize("kind", ["lookup and exit", "fused by token", "trees before exit"])
def test_drawn_drafts_are_not_merged_with_given_ones(tiny: Verifier, kind: str) -> None:
    drafter, prompts = build_drafter(KINDS[kind], tiny), random_prompts(2, 2)
    outputs = written(tiny, SAMPLED, prompts, 6)
    with pytest.raises(CalibrationError, match="in sampled decoding"):
        recorded(tiny, [drafter], prompts, outputs, SAMPLED)
    with pytest.raises(CalibrationError, match="in sampled decoding"):
        live(tiny, drafter, prompts, 3, SAMPLED, 6)


def test_models_must_run_as_far_as_what_they_are_part_of_drafts(tiny: Verifier) -> None:
    drafter, prompts = build_drafter(KINDS["lookup before exit"], tiny), random_prompts(2, 2)
    outputs = written(tiny, GREEDY, prompts, 6)
    with pytest.raises(CalibrationError, match=r"gamma_max must be at least the 5 tokens .* got 3"):
        recorded(tiny, [drafter], prompts, outputs, GREEDY, gamma_max=3)


def test_tables_of_a_job_are_read_with_their_parts(tiny: Verifier) -> None:
    read = TypeAdapter(AnyDrafter).validate_python
    table = {
        "kind": "ngram-before-model",
        "first": {"kind": "prompt-lookup"},
        "second": {"kind": "dynamic-exit", "exits": [1, 3]},
    }
    assert read(table).label == "prompt-lookup-before-dynamic-exit"
    with pytest.raises(ValidationError, match="'dynamic-exit'"):
        read({**table, "second": {"kind": "dinamic-exit"}})
    info = build_drafter(read(table), tiny).info
    assert (info.layers, info.max_draft_tokens, info.deterministic) == (3, 8, False)
    assert info.settings["second"]["settings"]["exits"] == [1, 3]
    assert info.settings["first"]["paradigm"] == "prompt-lookup"
    merged = build_drafter(MergedTrees(first=EXIT, second=DEEPER), tiny)
    assert (merged.info.layers, merged.info.kv_heads) == (5, 2)
    assert merged.step(2, 8, torch.Generator())() > 0
