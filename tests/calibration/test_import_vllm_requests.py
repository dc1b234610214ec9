"""Import of vLLM's per-request speculation metrics: what is exact comes back, what is drawn is counted and said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported import walk
from shared_data import shared_data

from calibration.common.errors import TraceError
from calibration.importers.origin import Origin
from calibration.importers.rounds import Tally, depth_rates, drafts_for, fill, rounds_of
from calibration.importers.vllm import import_vllm_requests
from calibration.traces import TraceSet
from calibration.traces.manifest import CostConstants, LinearCost

MODEL = Origin(drafter="small", paradigm="draft_model", temperature=0.0)
NGRAM = Origin(drafter="ngram", paradigm="ngram", temperature=0.0)


def answer(
    accepted: list[int], drafted: list[int], *, output: int | None = None, detailed: bool = True, longest: int = 3
) -> dict[str, Any]:
    """An answer as vLLM gives it: docs.vllm.ai, features/speculative_decoding/acceptance_metrics."""
    histogram = [accepted.count(j) for j in range(longest + 1)]
    spec: dict[str, Any] = {
        "mean_acceptance_length": 1 + sum(accepted) / max(len(accepted), 1),
        "draft_acceptance_rate": sum(accepted) / max(sum(drafted), 1),
        "acceptance_histogram": histogram,
        "num_spec_steps": len(accepted),
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": sum(drafted),
        "num_spec_tokens": longest,
    }
    if detailed:
        spec |= {"per_step_accepted": accepted, "per_step_drafted": drafted}
    tokens = 1 + sum(accepted) + len(accepted) if output is None else output
    return {
        "id": "chatcmpl-1",
        "model": "verifier-8b",
        "choices": [{"index": 0, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": tokens, "total_tokens": 11 + tokens},
        "metrics": {"speculative_decoding": spec},
    }


def write(folder: Path, *answers: Any, name: str = "chat.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(one) for one in answers) + "\n", encoding="utf-8")
    return path


def runs(traces: TraceSet) -> list[int]:
    return traces.positions["run_length"].to_pylist()  # type: ignore[no-any-return]


def test_rounds_become_match_bits_by_hand(tmp_path: Path) -> None:
    # Rounds of drafts of 3 at 1 (2 accepted), 4 (3), 8 (0), 9 (3, of which one fits into ten tokens).
    # Bits: 1 1 0 | 1 1 1 ? | 0 | 1, for positions 1 .. 9; only the one after the full acceptance is unknown.
    path = write(tmp_path, answer([2, 3, 0, 3], [3, 3, 3, 3], output=10))
    seen = set()
    for seed in range(20):
        made = runs(import_vllm_requests([path], origin=MODEL, seed=seed))
        bit = made[6]
        assert made == [2, 1, 0, 3, 2 + bit, 1 + bit, bit, 0, 1]
        seen.add(bit)
    assert seen == {0, 1}
    manifest = import_vllm_requests([path], origin=MODEL).manifest
    assert "4 measured where a round started, 0 measured as lower bounds, 2 that follow" in manifest.notes[0]
    assert "3 that depend on a drawn bit, 0 where a round had no draft" in manifest.notes[0]
    assert manifest.notes[1].endswith("conditional acceptance by depth: 0.750, 1.000, 0.667")
    assert "run lengths at 5 of 9 positions: inside accepted drafts" in manifest.unknown[0]


def test_depth_rates_leave_open_what_full_drafts_do_not_tell() -> None:
    # Depth 1: 3 of 4 accepted. Depth 2: drafted and reached twice, accepted once. Depth 3: never reached.
    rates = depth_rates([rounds_of([1, 2], [1, 2]), rounds_of([0, 1], [3, 3])])
    assert rates.tolist() == [0.75, 0.5]


class Engine:
    """Draws match bits and plays rounds over them: the truth that an import is compared with."""

    def __init__(self, seed: int, requests: int, chance: float) -> None:
        rng = np.random.default_rng(seed)
        self.outputs = rng.integers(1, 120, requests).tolist()
        self.bits = [(rng.random(total + 20) < chance).astype(int) for total in self.outputs]
        self.rng = rng

    def run(self, request: int, t: int, longest: int) -> int:
        misses = np.flatnonzero(self.bits[request][t : t + longest] == 0)
        return int(misses[0]) if len(misses) else longest

    def rounds(self, request: int, shortest: int, longest: int) -> tuple[list[int], list[int]]:
        accepted: list[int] = []
        drafted: list[int] = []
        t = 1
        while t < self.outputs[request]:
            length = int(self.rng.integers(shortest, longest + 1))
            accepted.append(self.run(request, t, length))
            drafted.append(length)
            t += accepted[-1] + 1
        return accepted, drafted


@pytest.mark.parametrize(("shortest", "longest"), [(4, 4), (1, 6)])
def test_a_draft_model_comes_back(tmp_path: Path, shortest: int, longest: int) -> None:
    engine = Engine(1, 150, 0.7)
    told = [engine.rounds(i, shortest, longest) for i in range(150)]
    lines = [answer(*one, output=total, longest=longest) for one, total in zip(told, engine.outputs, strict=True)]
    traces = import_vllm_requests([write(tmp_path, *lines)], origin=MODEL)
    assert traces.manifest.drafters[0].max_draft_tokens == longest
    assert traces.positions["proposal_length"].null_count == traces.positions.num_rows
    # 1. The rounds that were reported replay as they were, position by position.
    asked = {f"chat/{i}": drafted for i, (_, drafted) in enumerate(told)}
    replayed = walk(traces, longest, asked)
    for i, (accepted, drafted) in enumerate(told):
        mine = [one for one in replayed if one.sequence == f"chat/{i}"]
        left = [engine.outputs[i] - one.start for one in mine]
        assert [one.drafted for one in mine] == drafted
        assert [one.accepted for one in mine] == [min(a, r) for a, r in zip(accepted, left, strict=True)]


@pytest.mark.parametrize(("shortest", "longest"), [(4, 4), (1, 6)])
def test_what_is_called_known_is_true(shortest: int, longest: int) -> None:
    engine = Engine(2, 120, 0.7)
    told = [rounds_of(*engine.rounds(i, shortest, longest)) for i in range(120)]
    tally, right, free, drawn = Tally(), 0, 0, np.zeros(2)
    rng = np.random.default_rng(0)
    for i, (rounds, total) in enumerate(zip(told, engine.outputs, strict=True)):
        low, high = (
            fill(rounds, total, longest, np.full(longest, rate), looks_up=False, rng=rng) for rate in (0.0, 1.0)
        )
        truth = np.array([min(engine.run(i, t, longest), total - t) for t in range(1, total)], dtype=np.int64)
        known = low.runs == high.runs
        assert (low.runs[known] == truth[known]).all()
        assert (low.runs <= truth).all()
        assert (truth <= high.runs).all()
        right, free = right + int(known.sum()), free + int((~known).sum())
        tally.add(low.tally)
        chosen = fill(rounds, total, longest, np.full(longest, 0.7), looks_up=False, rng=rng)
        drawn += chosen.runs[~known].sum(), truth[~known].sum()
    assert tally.positions == right + free == sum(engine.outputs) - len(engine.outputs)
    assert tally.starts_exact + tally.inside_known == right
    assert tally.starts_open + tally.inside_drawn == free
    assert (tally.starts_open > 0) == (shortest < longest)
    assert right > free
    # With the drafter's own rate the drawn runs are right on average.
    assert abs(drawn[0] / drawn[1] - 1) < 0.1


def test_rounds_without_a_draft_are_found_from_the_token_count(tmp_path: Path) -> None:
    # 1 token of prefill, 3 + 2 of the rounds: the other four came one by one from lookups that found nothing.
    path = write(tmp_path, answer([2, 1], [3, 3], output=10))
    places = set()
    for seed in range(30):
        traces = import_vllm_requests([path], origin=NGRAM, seed=seed)
        rounds = walk(traces, 3)
        assert [(one.accepted, one.drafted) for one in rounds if one.drafted] == [(2, 3), (1, 3)]
        assert sum(one.drafted == 0 for one in rounds) == 4
        places.add(tuple(one.start for one in rounds if one.drafted))
    assert len(places) > 8
    assert "rounds without a draft stood in 1 request(s)" in traces.manifest.unknown[1]
    assert traces.manifest.drafters[0].deterministic


def test_whose_rounds_without_a_draft_are_must_be_said(tmp_path: Path) -> None:
    path = write(tmp_path, answer([2, 1], [3, 3], output=10))  # as above: four of six rounds
    for paradigm in ("unknown", "n-grma"):
        with pytest.raises(TraceError, match=r"chat.jsonl: 66.7% of rounds had no draft; .*--paradigm ngram"):
            import_vllm_requests([path], origin=Origin(paradigm=paradigm))
    assert all(one.drafted for one in walk(import_vllm_requests([path], origin=MODEL), 3))
    every = write(tmp_path, answer([2, 1], [3, 3]))
    assert import_vllm_requests([every]).sequences["output_tokens"].to_pylist() == [6]


def test_a_lookup_keeps_its_short_drafts_and_a_model_does_not(tmp_path: Path) -> None:
    path = write(tmp_path, answer([1, 3, 0, 1], [1, 3, 3, 3]))
    found = import_vllm_requests([path], origin=NGRAM).frame("positions")
    assert found["run_length"].tolist()[0] == 1
    assert found["proposal_length"].tolist()[0] == 1
    assert [(one.accepted, one.drafted) for one in walk(import_vllm_requests([path], origin=NGRAM), 3)] == [
        (1, 1),
        (3, 3),
        (0, 3),
        (1, 3),
    ]
    firsts = {runs(import_vllm_requests([path], origin=MODEL, seed=seed))[0] for seed in range(30)}
    assert firsts == {1, 3}  # the bit behind the short draft is open: the run ends there, or goes on into the next
    assert "lower bound" in import_vllm_requests([path], origin=MODEL).manifest.unknown[1]


def test_a_model_that_was_not_asked_is_not_blamed(tmp_path: Path) -> None:
    path = write(tmp_path, answer([2, 1], [3, 3], output=10))
    manifest = import_vllm_requests([path], origin=MODEL).manifest
    assert any("taken as the engine's choice" in note for note in manifest.notes)


def test_a_summary_keeps_the_histogram_and_draws_the_order(tmp_path: Path) -> None:
    # The documentation's own example: 43 steps of drafts of 3, histogram 39, 1, 0, 3.
    accepted = [0] * 39 + [1] + [3] * 3
    path = write(tmp_path, answer(accepted, [3] * 43, detailed=False))
    orders = set()
    for seed in range(3):
        traces = import_vllm_requests([path], origin=MODEL, seed=seed)
        order = tuple(one.accepted for one in walk(traces, 3))
        assert sorted(order) == sorted(accepted)
        orders.add(order)
    assert len(orders) == 3
    assert any("order of rounds in 1 request(s)" in item for item in traces.manifest.unknown)


def test_draft_lengths_add_up() -> None:
    accepted = np.array([0, 3, 1, 5, 0])
    for total in range(25, 10, -1):
        drafted = drafts_for(accepted, total, 5, np.random.default_rng(total))
        assert drafted is not None
        assert drafted.sum() == total
        assert (drafted >= np.maximum(accepted, 1)).all()
        assert (drafted <= 5).all()
    assert drafts_for(accepted, 10, 5, np.random.default_rng(0)) is None
    assert drafts_for(accepted, 26, 5, np.random.default_rng(0)) is None


def test_same_seed_same_tables(tmp_path: Path) -> None:
    path = write(tmp_path, answer([3, 3, 1, 0], [3, 3, 3, 3], output=14))
    first, second = (import_vllm_requests([path], origin=MODEL, seed=5) for _ in range(2))
    assert first.positions.equals(second.positions)


def test_streamed_chunks_and_bare_objects(tmp_path: Path) -> None:
    chunk = {**answer([1], [3]), "choices": [], "object": "chat.completion.chunk"}
    bare = {**answer([0, 2], [3, 3])["metrics"], "prompt_tokens": 5}  # as saved by a client: no choices, no usage
    more = {**answer([1], [3]), "metrics": None}  # n > 1
    traces = import_vllm_requests([write(tmp_path, chunk, bare, more)], origin=Origin(paradigm="draft_model"))
    assert traces.sequences["output_tokens"].to_pylist() == [3, 5]
    assert traces.sequences["prompt_tokens"].to_pylist() == [11, 5]
    assert traces.sequences["finish_reason"].to_pylist() == ["unknown", "unknown"]
    manifest = traces.manifest
    assert manifest.verifier.name == "verifier-8b"
    assert manifest.notes[-2:] == (
        "1 requests without a token count: taken to be as long as what their rounds emitted",
        "chat.jsonl: 1 object(s) without rounds left out",
    )


def test_costs_domain_and_origin_travel(tmp_path: Path) -> None:
    costs = CostConstants(source="a table", verifier=LinearCost(base_s=0.006))
    origin = Origin(drafter="e3", paradigm="eagle3", temperature=0.7, domain="talk", device="H100", costs=costs)
    manifest = import_vllm_requests([write(tmp_path, answer([1], [3]))], origin=origin).manifest
    assert (manifest.costs, manifest.kind, manifest.prompts[0].domain) == (costs, "imported", "talk")
    assert (manifest.decoding.mode, manifest.decoding.temperature) == ("sampled", 0.7)
    assert (manifest.device.name, manifest.device.kind) == ("H100", "unknown")
    assert "estimated (exact only for drafters that see tokens alone; paradigm 'eagle3')" in manifest.unknown[0]
    assert any("other draws of the sampler" in item for item in manifest.unknown)


def changed(spec: dict[str, Any], **values: Any) -> dict[str, Any]:
    whole = answer([1, 2], [3, 3])
    whole["metrics"]["speculative_decoding"] |= spec
    return {**whole, **values}


FAULTS: dict[str, tuple[Any, str]] = {
    "more accepted than drafted": (
        changed({"per_step_drafted": [0, 6], "per_step_accepted": [1, 2]}),
        "step 0: must accept at most the 0 token(s) drafted, got 1",
    ),
    "lists of other lengths": (changed({"per_step_drafted": [6]}), "per_step_drafted must have one entry per step"),
    "sums that differ": (
        changed({"num_accepted_draft_tokens": 4}),
        "per_step_accepted must add up to 4 tokens, got 3",
    ),
    "text for a count": (changed({"num_spec_steps": "2"}), "num_spec_steps must be a count, got '2'"),
    "no prompt tokens": (changed({}, usage={"completion_tokens": 6}), "prompt_tokens: must be a whole number >= 1"),
    "no tokens": (changed({}, usage={"prompt_tokens": 4, "completion_tokens": 0}), "completion_tokens: must be"),
    "not an object": ([1, 2], "must be a JSON object, got list"),
    "a histogram beyond its drafts": (
        changed({"per_step_drafted": None, "per_step_accepted": None, "num_draft_tokens": 7}),
        "2 drafts of at most 3 tokens must have the histogram's rounds inside them, got 7 drafted tokens",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_and_line(tmp_path: Path, fault: str) -> None:
    bad, message = FAULTS[fault]
    path = write(tmp_path, answer([1], [3]), bad)
    with pytest.raises(TraceError, match=re.escape(message)) as caught:
        import_vllm_requests([path])
    assert str(caught.value).startswith(f"{path}:2: ")


def test_other_faults(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="not found"):
        import_vllm_requests([tmp_path / "none.jsonl"])
    with pytest.raises(TraceError, match="at least one file"):
        import_vllm_requests([])
    silent = write(tmp_path, {**answer([1], [3]), "metrics": {"speculative_decoding": None}})
    with pytest.raises(TraceError, match="--per-request-spec-decode-metrics detailed"):
        import_vllm_requests([silent])
    with pytest.raises(TraceError, match="names of their own, got 'chat'"):
        import_vllm_requests([silent, silent])
    idle = write(tmp_path, answer([], [], output=4), name="idle.jsonl")
    with pytest.raises(TraceError, match="no request drafted a token"):
        import_vllm_requests([idle])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": 1}\n{"id":\n')
    with pytest.raises(TraceError, match=r"broken.jsonl:2: not valid JSON"):
        import_vllm_requests([broken])
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps([answer([1], [3]), 3]))
    with pytest.raises(TraceError, match="item 2: must be a JSON object, got int"):
        import_vllm_requests([listed])


@pytest.mark.parametrize(("drafter", "worst"), [("eagle", 0.03), ("ngram", 0.01)])
def test_against_run_lengths_known_everywhere(tmp_path: Path, drafter: str, worst: float) -> None:
    """Public lists tell the run length at every position: what the rounds of an engine leave of them."""
    path = shared_data("specdecode-bench-simulator", "data", "llama3.1-8B", "combined_gsm8k.jsonl")
    lines, truth = [], []
    for line in path.read_text(encoding="utf-8").splitlines()[:200]:
        emitted = json.loads(line)[f"acc_{drafter}"]["acc_len"]
        true = [min(length - 1, len(emitted) - t) for t, length in enumerate(emitted)]
        accepted, t = [], 1
        while t < len(true):
            accepted.append(min(true[t], 3))
            t += accepted[-1] + 1
        truth.append(true)
        lines.append(answer(accepted, [3] * len(accepted), output=len(true)))
    traces = import_vllm_requests([write(tmp_path, *lines)], origin=Origin(paradigm="eagle"))
    for draft_tokens in (1, 2, 3):
        expected = 0
        for true in truth:
            t = 1
            while t < len(true):
                t, expected = t + min(true[t], draft_tokens) + 1, expected + 1
        error = expected / len(walk(traces, draft_tokens)) - 1  # of the tokens per round
        assert abs(error) <= (0 if draft_tokens == 3 else worst)
