"""Which sequence a request replays, how long it is, and in which class: laws, shares and determinism."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from shared_data import shared_data

from calibration.common.errors import ScenarioError
from simulator import Scenario
from simulator.playback.replay import select_sequences
from simulator.scenario.workload import PoissonArrivals
from simulator.workload import ClosedSource, OpenSource, Request, make_source
from simulator.workload.binding import Binder

SEQUENCES = select_sequences(
    iid_traces(0.5, np.random.default_rng(0), sequences=7, output_tokens=40, domains=("chat", "code", "maths"))
)


def open_requests(seed: int = 0, requests: int = 3000, folder: Path | None = None, **load: Any) -> list[Request]:
    data = {"seed": seed, "workload": {"kind": "poisson", "rate_rps": 1.0, "requests": requests, **load}}
    source = make_source(Scenario.model_validate(data).placed(folder or Path()), SEQUENCES)
    assert isinstance(source, OpenSource)
    return source.admit(math.inf, requests)


def domains_of(requests: list[Request]) -> list[str]:
    return [SEQUENCES.domains[r.sequence] for r in requests]


def test_a_mix_has_its_shares_and_sequences_of_a_domain_take_turns() -> None:
    requests = open_requests(mix={"chat": 1.0, "code": 3.0, "maths": 0.0})
    share = Counter(domains_of(requests))
    assert share["maths"] == 0
    assert share["code"] / 3000 == pytest.approx(0.75, abs=3.5 * math.sqrt(0.1875 / 3000))
    # chat has the sequences 0, 3 and 6; code 1 and 4.
    assert [r.sequence for r in requests if SEQUENCES.domains[r.sequence] == "chat"][:7] == [0, 3, 6, 0, 3, 6, 0]
    shuffled = [r.sequence for r in open_requests(mix={"chat": 1.0}, order="shuffled")]
    assert all(sorted(shuffled[k : k + 3]) == [0, 3, 6] for k in range(0, 300, 3))
    assert len(set(map(tuple, np.reshape(shuffled[:300], (-1, 3)).tolist()))) == 6


def test_a_mix_of_what_is_not_served_is_refused() -> None:
    with pytest.raises(
        ScenarioError, match=r"workload.mix: no sequence of it is served, got 'math'; did you mean 'maths'"
    ):
        open_requests(mix={"math": 1.0})


def test_lengths_as_recorded_by_default_and_on_demand() -> None:
    for load in ({}, {"lengths": {"kind": "recorded"}}):
        assert {(r.prompt_tokens, r.output_tokens, r.resampled) for r in open_requests(**load)} == {(50, 40, False)}


def test_drawn_lengths_have_their_laws() -> None:
    n = 20_000
    lengths = {
        "kind": "drawn",
        "prompt": {"kind": "lognormal", "mean_tokens": 800.0, "cv": 1.5},
        "output": {"kind": "pmf", "tokens": [5, 40, 90], "weights": [1, 2, 1]},
    }
    requests = open_requests(requests=n, lengths=lengths)
    prompts = np.array([r.prompt_tokens for r in requests])
    outputs = np.array([r.output_tokens for r in requests])
    assert prompts.mean() == pytest.approx(800, rel=3.5 * 1.5 / math.sqrt(n))
    sigma = math.sqrt(math.log(1 + 1.5**2))
    law = stats.lognorm(sigma, scale=800 / math.exp(sigma**2 / 2))
    # Rounded to whole tokens: the distribution function half a token up.
    grid = np.unique(np.geomspace(10, 20_000, 300).astype(int))
    empirical = np.searchsorted(np.sort(prompts), grid, side="right") / n
    assert np.abs(empirical - law.cdf(grid + 0.5)).max() < 1.63 / math.sqrt(n)
    counts = [np.count_nonzero(outputs == tokens) for tokens in (5, 40, 90)]
    assert sum(counts) == n
    assert stats.chisquare(counts, [n / 4, n / 2, n / 4]).pvalue > 0.01
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 3.5 / math.sqrt(n)
    assert {r.resampled_tokens for r in requests} == {0, 50}


def test_a_cap_and_the_least_length() -> None:
    lengths = {"kind": "drawn", "output": {"kind": "lognormal", "mean_tokens": 4.0, "cv": 3.0, "max_tokens": 30}}
    outputs = [r.output_tokens for r in open_requests(lengths=lengths)]
    assert (min(outputs), max(outputs)) == (1, 30)
    constant = {"kind": "drawn", "prompt": {"kind": "constant", "tokens": 9}}
    assert {(r.prompt_tokens, r.output_tokens) for r in open_requests(lengths=constant)} == {(9, 40)}


def test_samples_come_as_pairs_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text("prefill,decode,more\n10,1,x\n20,2,x\n30,300,x\n")
    lengths = {"kind": "samples", "path": "samples.csv", "prompt_column": "prefill", "output_column": "decode"}
    requests = open_requests(folder=tmp_path, lengths=lengths)
    pairs = Counter((r.prompt_tokens, r.output_tokens) for r in requests)
    assert set(pairs) == {(10, 1), (20, 2), (30, 300)}
    assert stats.chisquare(list(pairs.values())).pvalue > 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts,output_token\n1,1\n", "column 'output_tokens': is missing; did you mean 'output_token'"),
        ("prompt_tokens,output_tokens\n", "column 'prompt_tokens': must hold at least one row"),
        ("prompt_tokens,output_tokens\n5,0\n", ":2: column 'output_tokens': must be a whole number >= 1, got '0'"),
        (
            "prompt_tokens,output_tokens\n5.5,1\n",
            ":2: column 'prompt_tokens': must be a whole number >= 1, got '5.5'",
        ),
    ],
)
def test_faulty_samples(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "samples.csv").write_text(text)
    with pytest.raises(ScenarioError) as caught:
        open_requests(folder=tmp_path, lengths={"kind": "samples", "path": "samples.csv"})
    assert message in str(caught.value)


def test_the_public_sharegpt_lengths() -> None:
    path = shared_data("sharegpt-lengths", "sharegpt_val_10k_llama2.csv")
    names = {"prompt_column": "num_prefill_tokens", "output_column": "num_decode_tokens"}
    requests = open_requests(requests=20_000, lengths={"kind": "samples", "path": str(path), **names})
    # Means 245.75 and 325.63 with standard deviations 548.96 and 241.88 (of the whole file).
    for name, mean, deviation in (("prompt_tokens", 245.7517, 548.96), ("output_tokens", 325.62987, 241.88)):
        drawn = np.mean([getattr(r, name) for r in requests])
        assert drawn == pytest.approx(mean, abs=3.5 * deviation / math.sqrt(20_000))


def test_service_classes_set_priorities_and_deadlines() -> None:
    classes = {"interactive": {"weight": 3, "deadline_s": 5.0}, "batch": {"weight": 1, "priority": 2}}
    requests = open_requests(classes=classes)
    urgent = [r for r in requests if r.priority == 0]
    assert len(urgent) / 3000 == pytest.approx(0.75, abs=3.5 * math.sqrt(0.1875 / 3000))
    assert all(r.deadline_s == r.arrival_s + 5.0 for r in urgent)
    assert all(r.deadline_s == math.inf and r.priority == 2 for r in requests if r.priority)
    plain = open_requests()
    assert {(r.priority, r.deadline_s) for r in plain} == {(0, math.inf)}
    # Classes, a mix and lengths have streams of their own: none of them moves an arrival or another one's draws.
    assert [r.arrival_s for r in requests] == [r.arrival_s for r in plain]
    mixed = open_requests(classes=classes, mix={"chat": 1.0, "code": 1.0})
    assert [r.priority for r in mixed] == [r.priority for r in requests]


def fields(request: Request) -> tuple[Any, ...]:
    return (
        request.sequence,
        request.prompt_tokens,
        request.output_tokens,
        request.priority,
        request.resampled_tokens,
    )


LOAD: dict[str, Any] = {
    "mix": {"chat": 1.0, "maths": 2.0},
    "order": "shuffled",
    "classes": {"a": {"weight": 1}, "b": {"weight": 2, "priority": 1, "deadline_s": 2.0}},
    "lengths": {
        "kind": "drawn",
        "prompt": {"kind": "lognormal", "mean_tokens": 50, "cv": 1.0},
        "output": {"kind": "pmf", "tokens": [3, 60], "weights": [1, 1]},
    },
}


def test_a_request_is_the_same_in_an_open_and_in_a_closed_loop() -> None:
    """What request k replays depends on the seed and on k alone, not on when it comes."""
    expected = [fields(r) for r in open_requests(seed=5, requests=600, **LOAD)]
    workload = {"kind": "closed", "concurrency": 7, "requests": 600, "stagger_s": 0.0, **LOAD}
    data = {"seed": 5, "workload": workload}
    source = make_source(Scenario.model_validate(data), SEQUENCES)
    assert isinstance(source, ClosedSource)
    taken: dict[int, Request] = {}
    while not source.done:
        for request in source.admit(0.0, 4):
            taken[request.id] = request
            source.end(request, 0.0)
    assert [fields(taken[k]) for k in range(600)] == expected
    assert source.resampled_requests == sum(r.resampled for r in taken.values())
    assert source.resampled_tokens == sum(r.resampled_tokens for r in taken.values())
    assert source.truncated == sum(r.output_tokens < 40 for r in taken.values())
    assert [fields(r) for r in open_requests(seed=6, requests=600, **LOAD)] != expected


@settings(max_examples=40)
@given(pieces=st.lists(st.integers(1, 50), min_size=1, max_size=8), seed=st.integers(0, 2**62))
def test_binding_in_pieces_is_binding_at_once(pieces: list[int], seed: int) -> None:
    load = PoissonArrivals.model_validate({"kind": "poisson", "rate_rps": 1.0, **LOAD})

    def binder() -> Binder:
        return Binder(load, "shuffled", SEQUENCES, seed, Path)

    whole, other = binder().bind(sum(pieces)), binder()
    parts = [other.bind(number) for number in pieces]
    for name in ("sequence", "prompt_tokens", "output_tokens", "recorded_tokens", "priority", "deadline_s"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist()
    assert {SEQUENCES.domains[i] for i in whole.sequence.tolist()} <= {"chat", "maths"}
