"""Published traces: hand-made files in every format, the real public ones where they are at hand, and every fault."""

from __future__ import annotations

import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from shared_data import shared_data

from calibration.common.errors import ScenarioError
from simulator import Scenario
from simulator.playback.replay import SequenceTable, select_sequences
from simulator.workload import OpenSource, Request, make_source

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def table(sequences: int = 4, output_tokens: int = 100) -> SequenceTable:
    rng = np.random.default_rng(0)
    return select_sequences(iid_traces(0.5, rng, sequences=sequences, output_tokens=output_tokens))


def read(
    path: Path, form: str, sequences: SequenceTable | None = None, **load: Any
) -> tuple[OpenSource, list[Request]]:
    data = {"workload": {"kind": "trace", "format": form, "path": str(path), **load}}
    source = make_source(Scenario.model_validate(data), sequences or table())
    assert isinstance(source, OpenSource)
    return source, source.admit(math.inf, source.counted)


def write(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_azure(tmp_path: Path) -> None:
    text = AZURE + (
        "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n\n"
        "2023-11-17 18:15:46.6805901,1,100\n"
    )
    source, requests = read(write(tmp_path, text), "azure")
    # The earliest row is time zero; the last is a day and a tenth of a microsecond later.
    assert [r.arrival_s for r in requests] == pytest.approx([0.0, 4.314579, 86400.0000001], abs=1e-12, rel=0)
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [(374, 44), (396, 109), (1, 100)]
    assert (source.truncated, source.resampled_requests, source.resampled_tokens) == (1, 1, 9)
    assert [r.resampled for r in requests] == [False, True, False]
    assert source.provenance["arrivals"] == "trace (azure)"
    assert source.provenance["lengths"] == "trace"


def test_azure_with_a_time_zone_and_packed(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.write(AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10T00:00:01.009930Z,2399,6\n")
    _, requests = read(path, "azure")
    assert [r.arrival_s for r in requests] == pytest.approx([0, 1])


def test_burstgpt_leaves_failed_calls_out_and_says_so(tmp_path: Path) -> None:
    text = BURST + (
        "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,API log\n"
        "50,GPT-4,0,0,0,API log\n60.5,ChatGPT,20,0,20,API log\n118.25,GPT-4,417,276,693,API log\n"
    )
    source, requests = read(write(tmp_path, text), "burstgpt")
    assert [r.arrival_s for r in requests] == [0.0, 40.0, 113.25]
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [(472, 18), (1087, 230), (417, 276)]
    assert source.provenance["failed_rows_left_out"] == 2
    assert all(r.client is None for r in requests)
    # The first so many that were served.
    assert len(read(write(tmp_path, text), "burstgpt", requests=3)[1]) == 3


def test_burstgpt_sessions_are_clients(tmp_path: Path) -> None:
    text = "Timestamp,Session ID,Model,Request tokens,Response tokens\n1,a,M,5,6\n2,,M,5,6\n3,b,M,5,6\n4,a,M,5,6\n"
    _, requests = read(write(tmp_path, text), "burstgpt")
    assert [r.client for r in requests] == ["a", None, "b", "a"]


def mooncake(*rows: dict[str, Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def test_mooncake_keeps_prefix_blocks(tmp_path: Path) -> None:
    text = mooncake(
        {"timestamp": 3000, "input_length": 1000, "output_length": 2, "hash_ids": [4, 7]},
        {"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [4, 5]},
        {"timestamp": 3000, "input_length": 3, "output_length": 4},
        {"timestamp": 3500, "input_length": 512, "output_length": 500, "hash_ids": [9]},
    )
    source, requests = read(write(tmp_path, text), "mooncake")
    assert [r.arrival_s for r in requests] == [0.0, 3.0, 3.0, 3.5]
    assert [r.prefix_hashes for r in requests] == [(4, 5), (4, 7), (), (9,)]
    assert {r.prefix_block_tokens for r in requests} == {512}
    assert [r.output_tokens for r in requests] == [5, 2, 4, 500]
    assert source.resampled_tokens == 400


def test_our_own_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n7,3,4\n2.5,1,200\n")
    source, requests = read(path, "csv")
    # As written: time does not begin at the first row.
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in requests] == [(2.5, 1, 200), (7.0, 3, 4)]
    assert source.resampled_tokens == 100


def test_limits_and_multiplier(tmp_path: Path) -> None:
    path = write(tmp_path, BURST + "".join(f"{10 * i},M,5,6,11,x\n" for i in range(10)))
    assert [r.arrival_s for r in read(path, "burstgpt", requests=3)[1]] == [0, 10, 20]
    assert [r.arrival_s for r in read(path, "burstgpt", duration_s=20.0)[1]] == [0, 10]
    fast = read(path, "burstgpt", rate_multiplier=5.0)[1]
    assert [r.arrival_s for r in fast] == [2 * i for i in range(10)]
    assert len(read(path, "burstgpt", rate_multiplier=5.0, duration_s=20.0)[1]) == 10
    # A duration explains why there are fewer.
    assert len(read(path, "burstgpt", requests=99, duration_s=35.0)[1]) == 4
    with pytest.raises(ScenarioError, match=r"workload.requests: must be at most the 10 that there are, got 99"):
        read(path, "burstgpt", requests=99)


def test_other_lengths_than_those_of_the_trace(tmp_path: Path) -> None:
    path = write(tmp_path, AZURE + "2023-11-16 18:15:46,374,44\n2023-11-16 18:15:47,3,4\n")
    _, requests = read(path, "azure", lengths={"kind": "recorded"})
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [(50, 100)] * 2
    lengths = {"kind": "drawn", "output": {"kind": "constant", "tokens": 3}}
    _, requests = read(path, "azure", lengths=lengths)
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [(50, 3)] * 2


@pytest.mark.parametrize(
    ("form", "text", "messages"),
    [
        (
            "azure",
            "TIMESTAMP,ContextToken,GeneratedTokens\n",
            ["'ContextTokens': is missing; did you mean 'ContextToken'"],
        ),
        ("azure", "", ["'TIMESTAMP': is missing"]),
        ("azure", AZURE, ["must hold at least one request"]),
        (
            "azure",
            AZURE + "yesterday,374,44\n2023-11-16 18:15:46,0,44\n2023-11-16 18:15:46,5\n,2.5,x\nnow,1,1\n",
            [
                ":2: column 'TIMESTAMP': must be a date and time like 2023-11-16 18:15:46.68, got 'yesterday'",
                ":3: column 'ContextTokens': must be a whole number >= 1, got '0'",
                ":4: column 'GeneratedTokens': must be a whole number >= 1, got ''",
                ":5: column 'TIMESTAMP'",
                ":5: column 'ContextTokens': must be a whole number >= 1, got '2.5'",
                ":5: column 'GeneratedTokens': must be a whole number >= 1, got 'x'",
                ":6: column 'TIMESTAMP': must be a date and time like 2023-11-16 18:15:46.68, got 'now'",
            ],
        ),
        ("azure", AZURE + "2023-13-16 18:15:46,5,5\n", [":2: column 'TIMESTAMP'"]),
        ("burstgpt", BURST + "-1,M,5,6,11,x\nnan,M,inf,6,11,x\n", ["got '-1'", "got 'nan'", "got 'inf'"]),
        ("burstgpt", BURST + "1,M,0,0,0,x\n", ["must hold at least one request"]),
        ("burstgpt", "Timestamp,Request tokens\n", ["'Response tokens': is missing"]),
        ("mooncake", "", ["must hold at least one request"]),
        ("mooncake", "[1]\n{\n", [":1: column '(all)': must be a JSON object", ":2: column '(all)': must be a JSON"]),
        (
            "mooncake",
            mooncake(
                {"timestamp": -1, "input_length": 0, "output_length": 2.5},
                {"timestamp": True, "output_length": "7", "input_length": 10**30},
                {"timestamp": 1, "output_length": 1, "input_length": 512, "hash_ids": [1, 2]},
                {"timestamp": 1, "output_length": 1, "hash_ids": ["a"]},
            ),
            [
                ":1: column 'timestamp': must be a whole number >= 0, got -1",
                ":1: column 'input_length': must be a whole number >= 1, got 0",
                ":1: column 'output_length': must be a whole number >= 1, got 2.5",
                ":2: column 'timestamp': must be a whole number >= 0, got True",
                ":2: column 'input_length'",
                ":2: column 'output_length': must be a whole number >= 1, got '7'",
                ":3: column 'hash_ids': must be at most 1 blocks of 512 tokens for input_length 512, got 2",
                ":4: column 'input_length': is missing",
                ":4: column 'hash_ids': must be a list of whole numbers >= 0, got ['a']",
            ],
        ),
        ("csv", "arrival_s,prompt_tokens,output_tokens\n-1,1,1\n", ["'arrival_s': must be a number >= 0, got '-1'"]),
    ],
)
def test_faults_name_file_line_column_rule_and_value(
    tmp_path: Path, form: str, text: str, messages: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ScenarioError) as caught:
        read(path, form)
    for message in messages:
        assert message in str(caught.value)
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())


def test_many_faults_are_counted_not_listed(tmp_path: Path) -> None:
    path = write(tmp_path, BURST + "x,M,1,1,2,y\n" * 25)
    with pytest.raises(ScenarioError) as caught:
        read(path, "burstgpt")
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1].endswith("and 15 more")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="not found"):
        read(tmp_path / "none.csv", "azure")
    with pytest.raises(ScenarioError, match="cannot be read"):
        read(write(tmp_path, "not packed", "trace.csv.gz"), "azure")
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"TIMESTAMP,ContextTokens,GeneratedTokens\n\xff\xfe,1,1\n")
    with pytest.raises(ScenarioError, match="must be UTF-8 text"):
        read(latin, "azure")


def test_the_public_azure_trace() -> None:
    path = shared_data("azure-llm-2023", "AzureLLMInferenceTrace_conv.csv")
    start = time.process_time()
    source, requests = read(path, "azure", table(40, 256))
    assert time.process_time() - start < 5, "0.1 s of CPU time on an idle machine"
    assert source.counted == len(requests) == 19_366
    prompts, outputs = (np.array([getattr(r, name) for r in requests]) for name in ("prompt_tokens", "output_tokens"))
    assert (prompts.sum(), outputs.sum()) == (22_361_870, 4_088_665)
    assert source.resampled_requests == np.count_nonzero(outputs > 256)
    assert source.resampled_tokens == np.maximum(outputs - 256, 0).sum()
    assert source.truncated == np.count_nonzero(outputs < 256)
    arrivals = np.array([r.arrival_s for r in requests])
    assert (np.diff(arrivals) >= 0).all()
    assert arrivals[0] == 0
    # 18:15:46.68059 to 19:14:08.4025270.
    assert arrivals[-1] == pytest.approx(58 * 60 + 21.721937, abs=1e-6)


def test_the_public_mooncake_trace() -> None:
    source, requests = read(shared_data("mooncake-fast25", "conversation_trace.jsonl"), "mooncake")
    assert source.counted == 12_031
    assert sum(r.prompt_tokens for r in requests) == 144_793_823
    assert sum(r.output_tokens for r in requests) == 4_122_048
    assert sum(len(r.prefix_hashes) for r in requests) == 288_500
    assert all(len(r.prefix_hashes) == -(-r.prompt_tokens // 512) for r in requests)
    assert requests[0].prefix_hashes[0] == requests[1].prefix_hashes[0] == 0
    assert requests[-1].arrival_s == pytest.approx(3536.999)
