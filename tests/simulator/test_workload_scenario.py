"""The [workload] table: what is accepted, every fault, files, hash and round trip; and whole runs of every kind."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from scenarios import scenario

from calibration.common.errors import ScenarioError
from simulator import Scenario, load_scenario, parse_scenario, simulate

KINDS: dict[str, dict[str, Any]] = {
    "closed": {"kind": "closed", "concurrency": 3, "think_s": 0.5, "think_law": "exponential", "requests": 30},
    "gamma": {"kind": "gamma", "rate_rps": 3.0, "cv": 2.0, "requests": 30},
    "piecewise": {"kind": "piecewise", "rates": [[0, 1.0], [5, 4.0]], "repeat_s": 10.0, "duration_s": 12.0},
    "clients": {"kind": "clients", "path": "w.csv", "lengths_path": "l.csv", "duration_s": 8.0},
    "azure": {"kind": "trace", "format": "azure", "path": "a.csv", "rate_multiplier": 2.0},
    "mooncake": {"kind": "trace", "format": "mooncake", "path": "m.jsonl", "requests": 20},
    "drawn": {
        "kind": "poisson",
        "rate_rps": 3.0,
        "requests": 30,
        "block_tokens": 5,
        "mix": {"chat": 2.0, "code": 1.0},
        "lengths": {"kind": "drawn", "output": {"kind": "lognormal", "mean_tokens": 30.0, "cv": 0.7}},
        "classes": {"urgent": {"weight": 1.0, "deadline_s": 2.0}, "any time": {"weight": 2.0, "priority": 1}},
    },
    "samples": {"kind": "gamma", "rate_rps": 3.0, "cv": 0.5, "lengths": {"kind": "samples", "path": "s.csv"}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    window = "".join(f"{10 * i},{1 + i},Gamma,0.6,c\n" for i in range(3))
    (tmp_path / "w.csv").write_text("t_s,rate_rps,dist,a,client\n" + window)
    (tmp_path / "l.csv").write_text("client,field,tokens,prob\nc,input_tokens,20,1\nc,output_tokens,33,1\n")
    rows = "".join(f"2023-11-16 18:15:{i:02d}.5,{30 + i},{10 + i}\n" for i in range(30))
    (tmp_path / "a.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    row = {"timestamp": 0, "input_length": 600, "output_length": 31, "hash_ids": [0, 1]}
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({**row, "timestamp": 300 * i}) for i in range(25)))
    (tmp_path / "s.csv").write_text("prompt_tokens,output_tokens\n10,5\n20,50\n")
    return tmp_path


def traces() -> Any:
    rng = np.random.default_rng(0)
    return iid_traces(0.6, rng, sequences=9, output_tokens=24, domains=("chat", "code"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_and_conserves_requests_and_tokens(folder: Path, kind: str) -> None:
    plan = scenario(3, workload=None).model_dump(exclude_none=True) | {"workload": KINDS[kind]}
    one = simulate(Scenario.model_validate(plan).placed(folder), traces())
    requests, summary = one.requests.to_pandas(), one.summary
    assert len(requests) == summary["completed"] > 0
    assert requests["request_id"].tolist() == list(range(len(requests)))
    assert one.iterations["emitted_tokens"].to_numpy().sum() == requests["output_tokens"].sum()
    beyond = np.maximum(requests["output_tokens"] - 24, 0)
    assert summary["resampled_tokens"] == beyond.sum()
    assert summary["resampled_requests"] == (beyond > 0).sum()
    assert summary["truncated_requests"] == (requests["output_tokens"] < 24).sum()
    assert ("resampling" in summary["provenance"]) == (summary["resampled_requests"] > 0)
    assert (requests["arrival_s"] <= requests["start_s"]).all()
    again = simulate(Scenario.model_validate(plan).placed(folder), traces())
    assert again.requests.equals(one.requests)
    assert again.iterations.equals(one.iterations)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "closed"])
def test_policies_that_are_compared_get_the_same_requests(folder: Path, kind: str) -> None:
    def offered(policy: int | None) -> list[list[Any]]:
        plan = scenario(policy, workload=None).model_dump(exclude_none=True) | {"workload": KINDS[kind]}
        requests = simulate(Scenario.model_validate(plan).placed(folder), traces()).requests
        return [requests[c].to_pylist() for c in ("sequence_id", "arrival_s", "prompt_tokens", "output_tokens")]

    assert offered(None) == offered(1) == offered(6)


def test_the_way_an_approximation_is_told(folder: Path) -> None:
    plan = scenario(3, workload=None).model_dump(exclude_none=True) | {"workload": KINDS["drawn"]}
    told = simulate(Scenario.model_validate(plan).placed(folder), traces()).summary["provenance"]
    assert told["resampling"].startswith("approximation: ")
    assert "blocks of 5 positions" in told["resampling"]
    assert told["workload"] == {"arrivals": "poisson", "lengths": "drawn"}


@pytest.mark.parametrize("kind", KINDS)
def test_scenarios_survive_being_written(folder: Path, kind: str) -> None:
    plan = parse_scenario({"name": "x", "workload": KINDS[kind]}, folder=folder)
    text = plan.to_toml(folder / "deeper")
    again = Scenario.model_validate(tomllib.loads(text)).placed(folder / "deeper")
    assert again.hash == plan.hash
    for path in ("w.csv", "l.csv", "a.csv", "s.csv", "m.jsonl"):
        if path in text:
            assert f'"../{path}"' in text
            assert again.locate(f"../{path}").resolve() == (folder / path).resolve()


def test_scenarios_of_before_keep_their_hash() -> None:
    """Keys that are new are left out of the hash where they are not given."""
    for load, keys in (
        ({"kind": "closed", "concurrency": 2}, {"kind", "concurrency", "keep_full", "copies", "order"}),
        ({"kind": "poisson", "rate_rps": 1.5}, {"kind", "rate_rps", "order"}),
        ({"kind": "csv", "path": "a.csv"}, {"kind", "path"}),
    ):
        plan = Scenario.model_validate({"workload": load})
        assert set(plan.model_dump(mode="json", exclude_none=True)["workload"]) == keys


@pytest.mark.parametrize(
    ("load", "messages"),
    [
        ({"kind": "gama", "rate_rps": 1}, ["workload.kind: no such kind, got 'gama'; did you mean 'gamma'?"]),
        ({"kind": "gamma", "rate_rps": 1}, ["workload.cv: must be given"]),
        ({"kind": "gamma", "rate_rps": 1, "cv": 0}, ["workload.cv: must be > 0, got 0"]),
        ({"kind": "poisson", "rate_rps": 1, "rate_multiplier": 0}, ["workload.rate_multiplier: must be > 0, got 0"]),
        ({"kind": "poisson", "rate_rps": 1, "duration_s": -1}, ["workload.duration_s: must be > 0, got -1"]),
        ({"kind": "piecewise", "rates": []}, ["workload.rates: must have at least 1 item"]),
        (
            {"kind": "piecewise", "rates": [[1, 2], [1, 0]]},
            ["must start at 0 seconds, got 1", "must have increasing starts"],
        ),
        ({"kind": "piecewise", "rates": [[0, 2], [1, "x"]]}, ["workload.rates[1][1]: must be a number, got 'x'"]),
        ({"kind": "piecewise", "rates": [[0, 2, 3]]}, ["workload.rates[0]"]),
        ({"kind": "piecewise", "rates": [[0, 0]]}, ["workload.rates: must have a rate above zero"]),
        ({"kind": "piecewise", "rates": [[0, 1], [9, 0]]}, ["must end with a rate above zero, or have repeat_s"]),
        (
            {"kind": "piecewise", "rates": [[0, 1], [9, 1]], "repeat_s": 9},
            ["workload.repeat_s: must be after the last start, 9"],
        ),
        (
            {"kind": "trace", "format": "azur", "path": "none"},
            ["got 'azur'; did you mean 'azure'?", "workload.path: no such file"],
        ),
        (
            {"kind": "trace", "format": "mooncake", "path": "m.jsonl", "lengths": {"kind": "recorded"}},
            ["workload.lengths: must be left out for format 'mooncake'"],
        ),
        (
            {"kind": "clients", "path": "w.csv"},
            ["workload: must have requests or duration_s where kind is 'clients'"],
        ),
        (
            {"kind": "clients", "path": "w.csv", "requests": 1, "lengths_path": "no"},
            ["workload.lengths_path: no such file, got 'no'"],
        ),
        (
            {"kind": "closed", "concurrency": 1, "think_law": "constant"},
            ["workload.think_s: must be given where think_law is"],
        ),
        ({"kind": "closed", "concurrency": 1, "think_s": -1}, ["workload.think_s: must be >= 0, got -1"]),
        (
            {
                "kind": "closed",
                "concurrency": 2,
                "copies": 2,
                "think_s": 1.0,
                "mix": {"chat": 1},
                "lengths": {"kind": "recorded"},
            },
            [f"workload.{key}: must be left out where copies > 1" for key in ("think_s", "mix", "lengths")],
        ),
        ({"kind": "poisson", "rate_rps": 1, "mix": {"chat": 0}}, ["workload.mix: must have a weight above zero"]),
        ({"kind": "poisson", "rate_rps": 1, "mix": {"chat": -1}}, ["workload.mix.chat: must be >= 0, got -1"]),
        ({"kind": "poisson", "rate_rps": 1, "mix": {}}, ["workload.mix: must have at least 1 item"]),
        (
            {"kind": "poisson", "rate_rps": 1, "classes": {"a": {"weight": 0}}},
            ["workload.classes: must have a weight above zero"],
        ),
        (
            {"kind": "poisson", "rate_rps": 1, "classes": {"a": {"wieght": 1}}},
            ["workload.classes.a.wieght: no such key; did you mean 'weight'?"],
        ),
        (
            {"kind": "poisson", "rate_rps": 1, "classes": {"a": {"priority": 1.5}}},
            ["workload.classes.a.priority: must be an integer"],
        ),
        ({"kind": "poisson", "rate_rps": 1, "block_tokens": 0}, ["workload.block_tokens: must be >= 1, got 0"]),
        (
            {"kind": "poisson", "rate_rps": 1, "lengths": {}},
            ["workload.lengths.kind: must be given; must be one of drawn, recorded, samples"],
        ),
        (
            {"kind": "poisson", "rate_rps": 1, "lengths": {"kind": "drawn"}},
            ["workload.lengths: must have prompt or output"],
        ),
        (
            {"kind": "poisson", "rate_rps": 1, "lengths": {"kind": "samples", "path": "no"}},
            ["workload.lengths.path: no such file, got 'no'"],
        ),
        (
            {
                "kind": "poisson",
                "rate_rps": 1,
                "lengths": {"kind": "drawn", "output": {"kind": "lognorm", "mean_tokens": 3}},
            },
            ["workload.lengths.output.kind: no such kind, got 'lognorm'; did you mean 'lognormal'?"],
        ),
        (
            {
                "kind": "poisson",
                "rate_rps": 1,
                "lengths": {"kind": "drawn", "prompt": {"kind": "lognormal", "mean_token": 3}},
            },
            [
                "workload.lengths.prompt.mean_tokens: must be given",
                "workload.lengths.prompt.mean_token: no such key; did you mean 'mean_tokens'?",
            ],
        ),
        (
            {
                "kind": "poisson",
                "rate_rps": 1,
                "lengths": {"kind": "drawn", "prompt": {"kind": "pmf", "tokens": [1, 2], "weights": [1]}},
            },
            ["workload.lengths.prompt.weights: must be as many as tokens, 2, got 1"],
        ),
        (
            {
                "kind": "poisson",
                "rate_rps": 1,
                "lengths": {"kind": "drawn", "prompt": {"kind": "pmf", "tokens": [1, 2], "weights": [0, 0]}},
            },
            ["workload.lengths.prompt.weights: must have a weight above zero"],
        ),
        ({"kind": "csv", "path": "a.csv", "mix": {"chat": 1}}, ["workload.mix: no such key"]),
    ],
)
def test_every_fault_has_its_place(folder: Path, load: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse_scenario({"workload": load}, folder=folder)
    lines = str(caught.value).splitlines()
    for message in messages:
        assert any(message in line for line in lines), str(caught.value)
    assert all(line.startswith("scenario: workload") for line in lines)


def test_domains_that_the_traces_lack_are_told_when_the_file_is_read(folder: Path) -> None:
    traces().write(folder / "traces")
    text = """
[traces]
path = "traces"
[workload]
kind = "poisson"
rate_rps = 1.0
[workload.mix]
chatt = 1
code = 1
"""
    (folder / "s.toml").write_text(text)
    with pytest.raises(
        ScenarioError, match=r"s.toml: workload.mix: not in the TraceSet, got 'chatt'; did you mean 'chat'"
    ):
        load_scenario(folder / "s.toml")
    (folder / "s.toml").write_text(text.replace("chatt", "chat"))
    assert load_scenario(folder / "s.toml").workload.kind == "poisson"
