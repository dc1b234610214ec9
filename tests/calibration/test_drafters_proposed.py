"""Drafters of given tokens: recorded as their proposers propose, verified live as chains and as trees."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import manifest
from live import verify
from replayed import CPU, GREEDY, SAMPLED, live, recorded, rows_of, same_rounds, walk, written
from scipy import stats
from tiny import random_prompts, tiny_verifier

from calibration.common.errors import CalibrationError
from calibration.drafters import DrafterSettings, Memory, Retrieval, Suffix, Trigram, build_drafter
from calibration.drafters.given import GivenDrafter, proposal
from calibration.models.drafter import Opening, Proposal
from calibration.models.lane import Lane, pad_left
from calibration.models.load import Verifier
from calibration.models.sampling import distribution, generator_for
from calibration.proposers import (
    Datastore,
    Draft,
    MemorySettings,
    RetrievalSettings,
    SuffixSettings,
    TrigramSettings,
    draft_trees,
    make,
    proposals,
    run_lengths,
)
from calibration.traces import DecodingInfo, DrafterInfo, TraceSet, make_table

COLD = DecodingInfo(mode="sampled", temperature=0.2)


def save_texts(folder: Path, texts: list[list[int]] | list[list[int] | None]) -> Path:
    """A TraceSet whose outputs are `texts`; positions do not matter."""
    names = [f"text-{i}" for i in range(len(texts))]
    lengths = [len(text or [0]) for text in texts]
    served = {
        "sequence_id": names,
        "domain": ["chat"] * len(texts),
        "prompt_tokens": [1] * len(texts),
        "output_tokens": lengths,
        "finish_reason": ["length"] * len(texts),
        "output_token_ids": texts,
    }
    rows = {"sequence_id": names, "drafter": ["drafter"] * len(texts), "position": [0] * len(texts)}
    rows |= {"run_length": [0] * len(texts)}
    tables = {"sequences": make_table("sequences", served), "positions": make_table("positions", rows)}
    return TraceSet.build(manifest(), tables).write(folder)


@pytest.fixture(scope="module")
def corpus(tiny: Verifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the verifier writes to some of the prompts that are recorded, so that there is something to find."""
    outputs = written(tiny, GREEDY, random_prompts(11, 6)[:4], 30)
    return save_texts(tmp_path_factory.mktemp("corpus") / "traces", [list(o.ids) for o in outputs])


KINDS: dict[str, DrafterSettings] = {
    "suffix": Suffix(),
    "retrieval": Retrieval(min_match=1, nodes=12, max_draft_tokens=6, datastore_path="elsewhere"),
    "retrieval-chain": Retrieval(min_match=1, shape="chain", name="retrieval-chain", datastore_path="elsewhere"),
    "trigram": Trigram(nodes=12, branching=3),
    "memory": Memory(warm_up=2),
}


def built(kind: str, verifier: Verifier, path: Path) -> Any:
    changes = {"corpus_path": str(path)} | ({"datastore_path": None} if kind.startswith("retrieval") else {})
    return build_drafter(KINDS[kind].model_copy(update=changes), verifier)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(Suffix, SuffixSettings), (Retrieval, RetrievalSettings), (Trigram, TrigramSettings), (Memory, MemorySettings)],
)
def test_kinds_have_the_fields_and_defaults_of_their_proposers(kind: Any, settings: Any) -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(settings)}
    own = {name: field.default for name, field in kind.model_fields.items()}
    outer = {"name", "kind", "corpus_path", "datastore_path"}
    assert {name: value for name, value in own.items() if name not in outer} == theirs
    assert kind().proposer() == settings()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rounds_are_those_of_the_replay(tiny: Verifier, corpus: Path, kind: str) -> None:
    assert same_rounds(tiny, built(kind, tiny, corpus)) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_rounds_are_those_of_the_replay(tiny: Verifier, corpus: Path, kind: str) -> None:
    """Given tokens are accepted as far as the text follows them: given the text, nothing is left to chance."""
    drafter, prompts = built(kind, tiny, corpus), random_prompts(11, 6)
    accepted = 0
    for gamma in (1, 3, 8):
        runs = live(tiny, drafter, prompts, gamma, COLD, 40, seed=gamma)
        trace = recorded(tiny, [drafter], prompts, runs, COLD)
        for row, run in enumerate(runs):
            assert run.rounds == walk(rows_of(trace.positions, f"r{row}", drafter.name), gamma)
            accepted += sum(r.accepted for r in run.rounds)
    assert accepted > 5


@pytest.mark.parametrize("kind", KINDS)
def test_recordings_hold_what_the_proposer_proposes(tiny: Verifier, corpus: Path, kind: str) -> None:
    drafter, prompts = built(kind, tiny, corpus), random_prompts(11, 6)[2:]
    outputs = written(tiny, GREEDY, prompts, 30)
    trace = recorded(tiny, [drafter], prompts, outputs, GREEDY)
    texts = TraceSet.read(corpus).sequences["output_token_ids"].to_pylist()
    given = KINDS[kind].proposer()  # type: ignore[attr-defined]
    trees = 0
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        drafts = proposals(make(given, corpus=texts), prompt, output.ids, given.max_draft_tokens)
        runs = run_lengths(drafts, output.ids)
        got = rows_of(trace.positions, f"r{row}", drafter.name)
        assert got["run_length"] == runs.run.tolist()
        assert got["proposal_length"] == runs.depth.tolist()
        for t, nodes in enumerate(got["proposal_nodes"]):
            assert nodes is None or nodes == runs.nodes[t, : runs.depth[t]].tolist()
            trees += nodes is not None and nodes != list(range(1, len(nodes) + 1))
    assert (trees > 0) == (kind in ("retrieval", "trigram"))


def test_the_manifest_says_what_was_read(tiny: Verifier, corpus: Path, tmp_path: Path) -> None:
    texts = TraceSet.read(corpus).sequences["output_token_ids"].to_pylist()
    flat = np.array([token for text in texts for token in (*text, -1)], dtype="<i4")
    told = built("suffix", tiny, corpus).info.settings
    assert told["corpus_tokens"] == sum(map(len, texts))
    assert told["corpus_texts"] == len(texts)
    assert told["corpus_sha256"] == hashlib.sha256(flat.tobytes()).hexdigest()
    assert told["occurrence"] == "recent"
    path = Datastore.build(texts).save(tmp_path / "store.npz")
    stored = build_drafter(Retrieval(datastore_path=str(path)), tiny)
    assert stored.info.settings["corpus_sha256"] == told["corpus_sha256"]
    assert "corpus_tokens" not in build_drafter(Suffix(), tiny).info.settings
    assert stored.info.max_draft_tokens == 10
    assert stored.step(2, 30, torch.Generator())() > 0


def test_texts_that_cannot_be_used_are_refused(tiny: Verifier, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="must have datastore_path or corpus_path, got neither"):
        build_drafter(Retrieval(), tiny)
    with pytest.raises(CalibrationError, match="must have datastore_path or corpus_path, got both"):
        build_drafter(Retrieval(corpus_path=str(corpus), datastore_path="x"), tiny)
    with pytest.raises(CalibrationError, match="must be a TraceSet or a corpus"):
        build_drafter(Suffix(corpus_path=str(tmp_path)), tiny)
    with pytest.raises(CalibrationError, match="'text-1' has none"):
        build_drafter(Memory(corpus_path=str(save_texts(tmp_path / "a", [[5, 6], None]))), tiny)
    with pytest.raises(CalibrationError, match="must be below the verifier's vocabulary 97, got 97"):
        build_drafter(Trigram(corpus_path=str(save_texts(tmp_path / "b", [[5, 97]]))), tiny)
    path = Datastore.build([[5, 6]], order=2).save(tmp_path / "small.npz")
    with pytest.raises(CalibrationError, match="max_match: must be <= the datastore's order 2, got 16"):
        build_drafter(Retrieval(datastore_path=str(path)), tiny)
    with pytest.raises(CalibrationError, match="min_match"):
        build_drafter(Suffix(min_match=0), tiny)


def test_the_overlap_of_a_tree_is_the_mass_of_its_first_tokens(tiny: Verifier, corpus: Path) -> None:
    drafter, prompts = built("retrieval", tiny, corpus), random_prompts(11, 2)
    outputs = written(tiny, SAMPLED, prompts, 20)
    trace = recorded(tiny, [drafter], prompts, outputs, SAMPLED)
    widest = 0
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        got = rows_of(trace.positions, f"r{row}", drafter.name)
        for t in range(len(output.ids)):
            text = [*prompt, *output.ids[:t]]
            proposer = drafter.make()
            proposer.extend(text)
            draft = proposer.propose(6)
            first = [x for x, up in zip(draft.tokens, draft.parents, strict=True) if up < 0]
            logits = tiny.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            mass = float(distribution(logits, SAMPLED.temperature, SAMPLED.top_p)[first].sum())
            assert got["overlap"][t] == (pytest.approx(mass, abs=1e-5) if first else None)
            widest = max(widest, len(first))
    assert widest > 1


# Verification of trees.


def random_tree(rng: np.random.Generator, nodes: int, vocabulary: int) -> Draft:
    parents = [int(rng.integers(-1, i)) for i in range(nodes)]
    return draft_trees.breadth_first(rng.integers(0, vocabulary, nodes).tolist(), parents)


def test_tree_logits_are_those_of_the_chains_through_the_tree(tiny: Verifier) -> None:
    """Ragged prompts, ragged trees, twice in a row with only one path of the first kept."""
    rng, prompts = np.random.default_rng(0), random_prompts(3, 4)
    lane = Lane(tiny.model, 4)
    lane.feed(*pad_left([p[:-1] for p in prompts], CPU))
    texts = [list(p) for p in prompts]
    for _ in range(2):
        trees = [random_tree(rng, n, 97) for n in (9, 1, 5, 7)]
        opening = Opening(tiny.model, prompts, [0] * 4, GREEDY, {})
        packed = proposal(trees, opening)
        assert packed.parents is not None
        tokens = torch.cat([torch.tensor([[text[-1]] for text in texts]), packed.tokens], 1)
        real = torch.arange(tokens.shape[1]) <= packed.counts[:, None]
        logits = lane.feed_tree(tokens, real, packed.parents)
        kept = torch.zeros_like(real)
        kept[:, 0] = True
        for row, tree in enumerate(trees):
            paths = path_of(tree)
            for node, path in enumerate([(), *paths]):
                wanted = tiny.model(input_ids=torch.tensor([[*texts[row], *path]]), use_cache=False).logits[0, -1]
                assert torch.allclose(logits[row, node], wanted, atol=1e-9)
            last = len(paths) - 1
            on = [i for i, path in enumerate(paths) if path == paths[last][: len(path)]]
            kept[row, [i + 1 for i in on]] = True
            texts[row] += [*paths[last], 7]
        lane.forget(~kept)


def path_of(tree: Draft) -> list[tuple[int, ...]]:
    """The tokens from the root to every node, in order."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents or (), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def test_verdicts_follow_the_verifiers_own_tokens_down_the_tree() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        trees = [random_tree(rng, int(rng.integers(1, 9)), 3) for _ in range(3)]
        width = max(len(tree.tokens) for tree in trees)
        logits = torch.as_tensor(rng.random((3, width + 1, 3)))
        tokens, parents = torch.zeros(3, width, dtype=torch.long), torch.full((3, width), -1)
        for row, tree in enumerate(trees):
            tokens[row, : len(tree.tokens)] = torch.tensor(tree.tokens)
            parents[row, : len(tree.tokens)] = torch.tensor(tree.parents)
        counts = torch.tensor([len(tree.tokens) for tree in trees])
        verdict = verify(logits, Proposal(tokens, counts, None, parents), GREEDY, generator_for(CPU, 0))
        for row, tree in enumerate(trees):
            paths, path = path_of(tree), ()
            own = int(logits[row, 0].argmax())
            while (*path, own) in paths:
                path = (*path, own)
                own = int(logits[row, 1 + paths.index(path)].argmax())
            assert verdict.accepted[row] == len(path)
            assert verdict.following[row] == own
            emitted = tokens[row][verdict.nodes[row]].tolist()
            assert emitted == list(path)


SMALL, HORIZON, ROWS = 7, 3, 5000


class _Bushy:
    """Proposes a fixed tree that depends on the last token alone."""

    def __init__(self) -> None:
        self._last = 0

    def extend(self, tokens: Any) -> None:
        for token in tokens:
            self._last = token

    def propose(self, draft_tokens: int) -> Draft:
        a, b = (self._last + 1) % SMALL, (self._last + 3) % SMALL
        return draft_trees.cut(draft_trees.from_paths([(a, b, a), (a, a), (b, a), (b, b, b)]), draft_tokens)


@pytest.mark.parametrize("gamma", [1, 3])
def test_sampled_text_with_trees_is_distributed_as_the_verifiers_own(gamma: int) -> None:
    small = tiny_verifier(5, vocabulary=SMALL, spread=0.35)
    info = DrafterInfo(name="bushy", paradigm="test", deterministic=True)
    prompt = [6, 5, 4, 3, 2, 1, 0]
    table = {}
    for text in itertools.product(range(SMALL), repeat=HORIZON):
        logits = small.model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
        p = distribution(logits[len(prompt) - 1 : -1], SAMPLED.temperature, SAMPLED.top_p)
        table[text] = float(np.prod([float(p[i, token]) for i, token in enumerate(text)]))
    runs = live(small, GivenDrafter(info, _Bushy), [prompt] * ROWS, gamma, SAMPLED, HORIZON, frozenset())
    assert sum(r.accepted for run in runs for r in run.rounds) > ROWS / 4
    seen = dict.fromkeys(table, 0)
    for run in runs:
        seen[run.ids] += 1
    big = [text for text, p in table.items() if p * ROWS >= 8]
    observed, expected = [seen[text] for text in big], [table[text] * ROWS for text in big]
    assert stats.chisquare([*observed, ROWS - sum(observed)], [*expected, ROWS - sum(expected)]).pvalue > 1e-3
