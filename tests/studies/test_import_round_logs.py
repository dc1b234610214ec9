"""Logs of rounds (LTD, HSD): what their columns mean, and that a replay gives the logged rounds back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from round_logs import write_hsd, write_ltd
from shared_data import shared_data

from calibration.common.errors import TraceError
from calibration.importers.rounds import read_columns
from calibration.traces import TraceSet
from simulator import Scenario, simulate
from studies.public.hsd import import_hsd, read_hsd
from studies.public.ltd import import_ltd, read_ltd

LOGGED = {
    ("eagle3", "gsm8k", 0): [(3, 8), (1, 8), (10, 8), (2, 8)],
    ("eagle3", "gsm8k", 1): [(1, 8), (1, 8), (5, 8)],
    ("ltd", "gsm8k", 0): [(2, 3), (5, 6), (8, 3), (1, 3)],
}


def replayed_rounds(traces: TraceSet) -> list[tuple[int, int, int]]:
    """Serve every sequence alone, drafting as deep as recorded: (rounds, drafted, accepted) of each."""
    info = traces.manifest.drafters[0]
    scenario = Scenario.model_validate(
        {
            "drafter": {"name": info.name},
            "stopping": {"policy": "fixed", "draft_tokens": info.max_draft_tokens},
            "engine": {"max_num_seqs": 1},
            "workload": {"kind": "closed", "concurrency": 1},
            "costs": {
                "verifier": {"kind": "linear", "base_s": 1.0},
                "drafter": {"kind": "linear", "base_s": 0.0},
            },
        }
    )
    table = simulate(scenario, traces).requests
    columns = (table[name].to_pylist() for name in ("rounds", "drafted_tokens", "accepted_tokens"))
    return list(zip(*columns, strict=True))


def test_rounds_of_a_fixed_tree_replay_one_by_one(tmp_path: Path) -> None:
    traces = import_ltd(*write_ltd(tmp_path, LOGGED), "eagle3")
    assert traces.sequences["sequence_id"].to_pylist() == ["gsm8k/0", "gsm8k/1"]
    assert traces.sequences["output_tokens"].to_pylist() == [17, 8]  # the prefill's token and what rounds emitted
    assert replayed_rounds(traces) == [(4, 4 * 9, 12), (3, 3 * 9, 4)]  # depth 8: nine passes


def test_a_round_verifies_the_tree_of_the_row_before(tmp_path: Path) -> None:
    """Trees of 3, 3, 6, 3: the first is not logged, its own row's is taken; 4 + 4 + 7 + 4 tokens deep."""
    traces = import_ltd(*write_ltd(tmp_path, LOGGED), "ltd")
    assert replayed_rounds(traces) == [(4, 4 + 4 + 7 + 4, 12)]
    assert "0 of 4 rounds accepted more" in traces.manifest.notes[-1]


def test_a_round_that_accepts_more_than_its_tree_is_deepened_and_counted(tmp_path: Path) -> None:
    """Where the log mixes turns."""
    traces = import_ltd(*write_ltd(tmp_path, {("ltd", "mt_bench", 81): [(1, 3), (9, 3), (2, 3)]}), "ltd")
    assert replayed_rounds(traces) == [(3, 4 + 8 + 4, 9)]
    assert "1 of 3 rounds accepted more" in traces.manifest.notes[-1]


def test_prompt_lengths_are_said_to_be_unknown(tmp_path: Path) -> None:
    manifest = import_ltd(*write_ltd(tmp_path, LOGGED), "eagle3").manifest
    assert any("prompt lengths" in line for line in manifest.unknown)


def test_questions_without_rounds_and_rounds_without_question_are_refused(tmp_path: Path) -> None:
    rounds, questions = write_ltd(tmp_path, LOGGED)
    text = questions.read_text()
    questions.write_text(text + "\nT,eagle3,gsm8k,7,10,1.0,3,m")
    with pytest.raises(TraceError, match=r":7: eagle3 gsm8k 7 has no row in"):
        read_ltd(rounds, questions)
    questions.write_text("\n".join(line for line in text.splitlines() if ",eagle3,gsm8k,1," not in line))
    with pytest.raises(TraceError, match="eagle3 gsm8k 1 has no row in"):
        read_ltd(rounds, questions)


def test_an_unknown_method_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="got 'eagle'; did you mean 'eagle3'"):
        import_ltd(*write_ltd(tmp_path, LOGGED), "eagle")


def test_draft_length_counts_the_root(tmp_path: Path) -> None:
    file = write_hsd(tmp_path, {("a", 0): [(6, 7), (0, 3), (2, 7)], ("a", 1): [(1, 4)], ("b", 0): [(3, 7)]})
    traces = import_hsd(file, "a")
    assert traces.manifest.decoding.mode == "sampled"
    assert traces.sequences["output_tokens"].to_pylist() == [12, 3]
    assert replayed_rounds(traces) == [(3, 6 + 2 + 6, 8), (1, 3, 1)]


def test_a_tree_cannot_accept_its_root(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r":3: accept_length must be below draft_length = 3"):
        read_hsd(write_hsd(tmp_path, {("a", 0): [(2, 7), (3, 3)]}))


def test_parts_of_a_round_come_in_seconds(tmp_path: Path) -> None:
    (question,) = read_hsd(write_hsd(tmp_path, {("a", 0): [(2, 7)]}, round_ms=30.0))
    assert question.verify_s == pytest.approx([0.021])
    assert question.round_s == pytest.approx([0.030])


@pytest.mark.parametrize(
    ("text", "kinds", "told"),
    [
        ("a,b\n1,2\n", {"c": "count"}, "column 'c' is missing; it has a, b"),
        ("a\n1\n2.5\n", {"a": "count"}, r":3: column 'a': must be a whole number >= 0, got '2.5'"),
        ("a\n1\nx\n", {"a": "seconds"}, r":3: column 'a': must be a number >= 0, got 'x'"),
        ("a\n-1\n", {"a": "seconds"}, r":2: column 'a': must be a number >= 0, got '-1'"),
        ("a\n", {"a": "text"}, "must hold at least one row"),
    ],
)
def test_faults_of_a_table_are_told_with_their_place(tmp_path: Path, text: str, kinds: dict, told: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(TraceError, match=told):
        read_columns(file, kinds)
    with pytest.raises(TraceError, match="not found"):
        read_columns(tmp_path / "none.csv", kinds)


def test_the_public_log_is_what_its_columns_are_taken_for() -> None:
    """gsm8k: what is accepted never exceeds the tree of the row before, and adds up to the tokens of the question."""
    folder = shared_data("eagle3-perstep-ltd")
    questions = read_ltd(folder / "per_step.dev.csv.gz", folder / "per_question.dev.csv")
    whole = [q for q in questions if q.rounds is not None and q.benchmark == "gsm8k"]
    assert len(whole) == 160
    for question in whole:
        assert question.rounds is not None
        assert (question.rounds.accepted[1:] <= question.rounds.passes[:-1]).all()
        assert (question.rounds.accepted + 1).sum() == question.new_tokens
    same_row = np.concatenate([q.rounds.accepted > q.rounds.passes for q in whole if q.rounds and q.method == "ltd"])
    assert same_row.mean() > 0.05
