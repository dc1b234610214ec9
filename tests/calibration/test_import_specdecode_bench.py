"""Import of SpecDecode-Bench acceptance lists: conventions, faults, and the real files where at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shared_data import shared_data

from calibration.common.errors import TraceError
from calibration.importers import import_specdecode_bench
from calibration.traces.manifest import CostConstants, LinearCost

REQUEST: dict[str, Any] = {
    "id": "7",
    "prompt_token_ids": [1, 2, 3, 4, 5],
    "generated_token_ids": [9, 3, 4, 5, 8],
    "acc_eagle": {"acc_len": [3, 1, 2, 1, 2]},
    "acc_ngram": {"acc_len": [1, 1, 1, 1, 1]},
}


def write(folder: Path, *requests: Any, name: str = "combined_chat.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(r) for r in requests) + "\n", encoding="utf-8")
    return path


def rows(path: Path, drafter: str, **options: Any) -> list[tuple[int, int]]:
    frame = import_specdecode_bench([path], **options).frame("positions")
    mine = frame[frame["drafter"] == drafter]
    return list(zip(mine["position"].tolist(), mine["run_length"].tolist(), strict=True))


def test_emitted_lengths_become_run_lengths_without_the_bonus(tmp_path: Path) -> None:
    # acc_len[4] = 2 emits one token past the end of five: the run is cut to the one token that is left.
    assert rows(write(tmp_path, REQUEST), "eagle") == [(0, 2), (1, 0), (2, 1), (3, 0), (4, 1)]


def test_published_alignment_reads_one_place_early(tmp_path: Path) -> None:
    path = write(tmp_path, REQUEST)
    assert rows(path, "eagle", alignment="published") == [(1, 2), (2, 0), (3, 1), (4, 0)]


def test_a_list_of_another_length_is_a_sequence_of_its_own(tmp_path: Path) -> None:
    other = {**REQUEST, "acc_eagle": {"acc_len": [2, 1, 1]}}
    traces = import_specdecode_bench([write(tmp_path, other)])
    sequences = traces.frame("sequences").set_index("sequence_id")
    assert sequences["output_tokens"].to_dict() == {"chat/7": 5, "chat/7/eagle": 3}
    assert sequences.loc["chat/7/eagle", "output_token_ids"] is None
    positions = traces.frame("positions")
    assert set(positions.loc[positions["drafter"] == "eagle", "sequence_id"]) == {"chat/7/eagle"}


def test_ngram_proposals_come_from_the_documented_rule(tmp_path: Path) -> None:
    # Only after [.., 3, 4, 5] does a 3-gram recur; what followed it in the prompt is output[0] = 9.
    request = {**REQUEST, "acc_ngram": {"acc_len": [1, 1, 1, 1, 1]}}
    traces = import_specdecode_bench([write(tmp_path, request)])
    frame = traces.frame("positions")
    ngram = frame[frame["drafter"] == "ngram"]
    assert ngram["proposal_length"].tolist() == [0, 0, 0, 0, 4]
    assert "reproduces 5 of 5" in traces.manifest.notes[0]
    assert frame[frame["drafter"] == "eagle"]["proposal_length"].isna().all()


def test_costs_and_unknowns_travel_in_the_manifest(tmp_path: Path) -> None:
    costs = CostConstants(source="a table", verifier=LinearCost(base_s=0.006), overhead_s=0.001)
    manifest = import_specdecode_bench([write(tmp_path, REQUEST)], costs=costs, domain="talk").manifest
    assert manifest.costs == costs
    assert manifest.kind == "imported"
    assert [p.domain for p in manifest.prompts] == ["talk"]
    assert any("timings" in item for item in manifest.unknown)


FAULTS: dict[str, tuple[Any, str]] = {
    "no id": ({k: v for k, v in REQUEST.items() if k != "id"}, "key 'id' is missing"),
    "no list": ({k: v for k, v in REQUEST.items() if not k.startswith("acc_")}, "no acceptance list"),
    "zero emitted": ({**REQUEST, "acc_eagle": {"acc_len": [0, 1]}}, "acc_eagle.acc_len: must be a list"),
    "text for ids": ({**REQUEST, "prompt_token_ids": "abc"}, "prompt_token_ids: must be a list"),
    "not an object": ([1, 2], "must be a JSON object, got list"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_and_line(tmp_path: Path, fault: str) -> None:
    bad, message = FAULTS[fault]
    path = write(tmp_path, {**REQUEST, "id": "1"}, bad)
    with pytest.raises(TraceError) as caught:
        import_specdecode_bench([path])
    assert f"{path}:2: {message}" in str(caught.value)


def test_other_faults(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"not found"):
        import_specdecode_bench([tmp_path / "none.jsonl"])
    with pytest.raises(TraceError, match=r"id '7' occurs twice"):
        import_specdecode_bench([write(tmp_path, REQUEST, REQUEST)])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": 1,\n')
    with pytest.raises(TraceError, match=r"broken.jsonl:1: not valid JSON"):
        import_specdecode_bench([broken])


def test_the_public_files() -> None:
    path = shared_data("specdecode-bench-simulator", "data", "llama3.1-8B", "combined_gsm8k.jsonl")
    traces = import_specdecode_bench([path])
    frame = traces.frame("positions")
    assert frame[frame["drafter"] == "eagle"]["sequence_id"].nunique() == 300
    # The rule that proposes n-grams gives the recorded list back from the token ids: the alignment is right.
    assert traces.manifest.notes[0].endswith("reproduces 49848 of 49848 recorded run lengths")
    # Conditional acceptance at depth 1, published with these files as .716, with rounds of EAGLE from position 1 on.
    first = frame[(frame["drafter"] == "eagle") & (frame["position"] > 0)]
    assert 0.69 < (first["run_length"] > 0).mean() < 0.74
