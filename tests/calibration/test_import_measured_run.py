"""From the text of a measured run to a TraceSet: acceptance by a search by hand, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scenarios import scenario

from calibration.common.errors import TraceError
from calibration.importers.measured_run import TokenDrafter, import_measured_run
from calibration.measured import EngineInfo, Manifest, MeasuredRun
from calibration.observe.prompts import Prompt
from calibration.proposers import LookupSettings, SuffixSettings, TrigramSettings
from calibration.traces import DeviceInfo, PromptSource, TraceSet
from simulator import simulate

PROMPTS = [Prompt("a", "chat", (1, 2, 3, 4, 1, 2)), Prompt("b", "code", (5, 6)), Prompt("unused", "chat", (9,))]
TEXTS = {"a": [3, 4, 1, 7, 1, 2, 3], "b": [5, 6, 5, 6, 8]}


def measured(rows: list[tuple[int, str, list[int] | None]], **columns: Any) -> MeasuredRun:
    """A run of (repeat, sequence, text); times are of no account here."""
    lengths = {prompt.sequence_id: len(prompt.token_ids or ()) for prompt in PROMPTS}
    count = len(rows)
    table: dict[str, list[Any]] = {
        "repeat": [repeat for repeat, _, _ in rows],
        "request_id": list(range(count)),
        "sequence_id": [name for _, name, _ in rows],
        "domain": ["chat" if name == "a" else "code" for _, name, _ in rows],
        "counted": [True] * count,
        "arrival_s": [0.0] * count,
        "first_token_s": [1.0] * count,
        "finish_s": [2.0] * count,
        "prompt_tokens": [lengths.get(name, 1) for _, name, _ in rows],
        "output_tokens": [1 if ids is None else len(ids) for _, _, ids in rows],
        "output_token_ids": [ids for _, _, ids in rows],
    }
    manifest = Manifest(
        paceline_version="0",
        name="plain-2",
        role="fit",
        engine=EngineInfo(name="engine", version="7"),
        model="smollm2-135m",
        device=DeviceInfo(name="a processor", kind="cpu"),
        clock="thread-cpu",
        repeats=1 + max(repeat for repeat, _, _ in rows),
        created="2026-01-01T00:00:00+00:00",
        command="observe",
        scenario_hash="abc",
    )
    return MeasuredRun.build(manifest, {**table, **columns}, None, "")


RUN = measured([(0, "b", TEXTS["b"]), (0, "a", TEXTS["a"]), (1, "a", TEXTS["a"]), (1, "b", [5, 6, 5, 9, 9])])


def lookup(known: list[int], ngram_max: int, limit: int) -> list[int]:
    """The earliest occurrence of the longest suffix, looked for from the left."""
    for n in range(min(ngram_max, len(known) - 1), 0, -1):
        for start in range(len(known) - n):
            if known[start : start + n] == known[len(known) - n :]:
                return known[start + n : start + n + limit]
    return []


@pytest.mark.parametrize("ngram_max", [1, 3])
def test_acceptance_is_that_of_a_search_by_hand(ngram_max: int) -> None:
    drafter = TokenDrafter("lookup", LookupSettings(ngram_max=ngram_max, max_draft_tokens=4))
    traces = import_measured_run(RUN, PROMPTS, [drafter])
    frame = traces.frame("positions")
    for prompt in PROMPTS[:2]:
        text, mine = TEXTS[prompt.sequence_id], frame[frame.sequence_id == prompt.sequence_id]
        for t, run, proposed in zip(mine.position, mine.run_length, mine.proposal_length, strict=True):
            draft = lookup([*(prompt.token_ids or ()), *text[:t]], ngram_max, 4)
            agreed = 0
            while agreed < min(len(draft), len(text) - t) and draft[agreed] == text[t + agreed]:
                agreed += 1
            assert (run, proposed) == (agreed, len(draft)), (prompt.sequence_id, t)
    assert frame.proposal_nodes.isna().all()


def test_the_text_is_that_of_the_first_repeat_and_others_are_counted(tmp_path: Path) -> None:
    traces = TraceSet.read(import_measured_run(RUN, PROMPTS, command="import").write(tmp_path / "traces"))
    sequences = traces.frame("sequences")
    assert sequences.sequence_id.tolist() == ["b", "a"]
    assert {
        name: ids.tolist() for name, ids in zip(sequences.sequence_id, sequences.output_token_ids, strict=True)
    } == TEXTS
    assert [tuple(ids) for ids in sequences.prompt_token_ids] == [(5, 6), (1, 2, 3, 4, 1, 2)]
    told = traces.manifest
    assert (told.kind, told.verifier.name, told.device.name, told.command) == (
        "recorded",
        "smollm2-135m",
        "a processor",
        "import",
    )
    assert told.notes == (
        "text: of the measured run plain-2 on engine 7",
        "text repeats: 2 further requests of these prompts, of which 1 received another text",
    )
    assert [(source.domain, source.prompts) for source in told.prompts] == [("code", 1), ("chat", 1)]
    drafter = told.drafters[0]
    assert (drafter.name, drafter.paradigm, drafter.deterministic) == ("prompt-lookup", "prompt-lookup", True)
    assert drafter.settings == {"ngram_max": 3, "ngram_min": 1, "match": "earliest"}
    assert traces.timings.num_rows == 0


def test_a_longer_text_that_agrees_counts() -> None:
    run = measured([(0, "b", [5, 6]), (0, "b", TEXTS["b"]), (0, "b", [5])])
    sequences = import_measured_run(run, PROMPTS).frame("sequences")
    assert sequences.output_token_ids.tolist()[0].tolist() == TEXTS["b"]
    own = PromptSource(name="mine.jsonl", sha256=None, domain="code", prompts=1)
    assert import_measured_run(run, PROMPTS, sources=[own]).manifest.prompts == (own,)


def test_several_drafters_trees_among_them() -> None:
    drafters = [TokenDrafter("suffix", SuffixSettings()), TokenDrafter("tree", TrigramSettings())]
    traces = import_measured_run(RUN, PROMPTS, drafters)
    assert [drafter.paradigm for drafter in traces.manifest.drafters] == ["suffix", "trigram"]
    frame = traces.frame("positions")
    assert frame[frame.drafter == "suffix"].proposal_nodes.isna().all()
    assert frame[frame.drafter == "tree"].proposal_nodes.notna().all()
    assert (frame.run_length <= frame.proposal_length).all()


def test_the_rounds_of_the_simulator_follow_from_it() -> None:
    traces = import_measured_run(RUN, PROMPTS)
    result = simulate(scenario(3, batch=1, drafter={"name": "prompt-lookup"}), traces)
    rows = {row["sequence_id"]: row for row in result.requests.to_pylist()}
    # Sequence a, prompt 1 2 3 4 1 2, by hand: the prefill gives 3, and 4 1 2 is drafted, of which 4 1 are accepted
    # (and 7 comes); after 7 nothing is known (1 comes); after 1, 2 3 4 is drafted, and the text ends with 2 3.
    assert (rows["a"]["rounds"], rows["a"]["drafted_tokens"], rows["a"]["accepted_tokens"]) == (3, 6, 4)


FAULTS: dict[str, tuple[MeasuredRun, str]] = {
    "speculation": (
        measured([(0, "b", TEXTS["b"])], drafts=[1], drafted_tokens=[2], accepted_tokens=[1]),
        "measured run plain-2: must be a run without speculation",
    ),
    "no ids": (measured([(0, "b", None)]), "output_token_ids must be recorded, request 0 has none"),
    "no prompt": (measured([(0, "c", [1])]), "prompts must hold the 1 token ids of 'c', got no such prompt"),
    "another prompt": (
        measured([(0, "b", TEXTS["b"])], prompt_tokens=[7]),
        "prompts must hold the 7 token ids of 'b', got 2 tokens",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str) -> None:
    run, message = FAULTS[fault]
    with pytest.raises(TraceError, match=message):
        import_measured_run(run, PROMPTS)


def test_a_prompt_without_ids_is_refused() -> None:
    prompts = [replace(PROMPTS[1], token_ids=None, text="hello")]
    with pytest.raises(TraceError, match="must hold the 2 token ids of 'b', got 0 tokens"):
        import_measured_run(measured([(0, "b", TEXTS["b"])]), prompts)
