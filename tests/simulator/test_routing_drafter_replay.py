"""Replay of several drafters at once: the same answers as each drafter's own replay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import random_runs
from several import several

from calibration.traces import TraceSet
from simulator.drafter_routing.choice import ManyRuns, compile_drafters
from simulator.drafter_routing.group import best_ways, way_cost
from simulator.playback.replay import Replay, SequenceTable, compile_replay, select_sequences

NAMES = ("a", "b", "c")


def drawn_traces(seed: int, sampled: bool, proposals: bool) -> TraceSet:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, 4).tolist()
    runs = {name: [random_runs(rng, n, own_state=True) for n in lengths] for name in NAMES}
    limits = {"c": [[n + int(rng.integers(0, 3)) for n in row] for row in runs["c"]]} if proposals else None
    chances = {name: [rng.random(n).tolist() for n in lengths] for name in ("a", "b")} if sampled else None
    return several(runs, proposals=limits, probabilities=chances, domains=("chat", "math"))


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.booleans(), st.booleans(), st.booleans())
def test_each_row_answers_as_its_own_drafter_alone(seed: int, sampled: bool, proposals: bool, longer: bool) -> None:
    traces = drawn_traces(seed, sampled, proposals)
    table = select_sequences(traces, drafter=NAMES)
    many = compile_drafters(traces, NAMES, table, seed=seed, longest_draft=4, block_tokens=3)
    alone: list[Replay] = [
        compile_replay(traces, name, table, slots=2, seed=seed, longest_draft=4, block_tokens=3) for name in NAMES
    ]
    rng = np.random.default_rng(seed)
    live: list[tuple[int, int, int, list[int]]] = []
    for request in range(12):
        sequence = int(rng.integers(len(table)))
        recorded = table.output_tokens[sequence]
        if max(table.output_tokens) < 3:
            continue
        tokens = recorded + (int(rng.integers(0, 9)) if longer and longest_of_domain(table, sequence) > 1 else 0)
        starts = [replay.open(sequence, request, tokens) for replay in alone]
        live.append((sequence, many.open(sequence, request, tokens), tokens, starts))
        if len(live) > 3:
            _, base, _, places = live.pop(int(rng.integers(4)))
            many.close(int(many.at(base, many.joint)))
            for replay, place in zip(alone, places, strict=True):
                replay.close(place)
        for _, base, length, places in live:
            check(many, alone, base, length, places)


def longest_of_domain(table: SequenceTable, sequence: int) -> int:
    """The most output tokens of a sequence of the same domain."""
    domain = table.domains[sequence]
    return max(n for other, n in zip(table.domains, table.output_tokens, strict=True) if other == domain)


def check(many: ManyRuns, alone: list[Replay], base: int, tokens: int, places: list[int]) -> None:
    cursors = np.arange(base, base + tokens)
    runs = []
    for drafter, (replay, place) in enumerate(zip(alone, places, strict=True)):
        here = many.at(cursors, drafter)
        stretch = np.arange(place, place + tokens)
        assert many.row[here].tolist() == [drafter] * tokens
        assert many.run_length[here].tolist() == replay.run_length[stretch].tolist()
        assert many.positions(here).tolist() == replay.positions(stretch).tolist()
        if replay.proposal_length is not None:
            assert many.proposal_length is not None
            assert many.proposal_length[here].tolist() == replay.proposal_length[stretch].tolist()
        elif many.proposal_length is not None:
            assert (many.proposal_length[here] > 10**6).all()
        for other in range(many.joint):
            assert many.at(here, other).tolist() == many.at(cursors, other).tolist()
        runs.append(replay.run_length[stretch])
    joint = many.at(cursors, many.joint)
    assert many.run_length[joint].tolist() == np.max(runs, axis=0).tolist()


def test_memory_follows_the_requests_that_are_live() -> None:
    rng = np.random.default_rng(1)
    chances = {name: [rng.random(30).tolist()] * 2 for name in ("a", "b")}
    traces = several({name: [[0] * 30] * 2 for name in ("a", "b")}, probabilities=chances)
    many = compile_drafters(traces, ("a", "b"), select_sequences(traces), seed=0, longest_draft=3, block_tokens=8)
    sizes = []
    for request in range(200):
        many.close(many.open(request % 2, request))
        sizes.append(len(many.run_length))
    assert sizes[1] == sizes[-1]


ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 6), st.floats(0.1, 9)), min_size=8, max_size=8), min_size=1, max_size=3
)


@given(ROWS)
def test_the_best_way_is_the_cheapest_one_found_by_trying_all(rows: list[list[tuple[int, float]]]) -> None:
    ends = np.array([[min(t + run + 1, 8) for t, (run, _) in enumerate(row)] for row in rows])
    costs = np.array([[cost for _, cost in row] for row in rows])

    def cheapest(position: int) -> float:
        if position >= 8:
            return 0.0
        ways = [cost[position] + cheapest(int(end[position])) for end, cost in zip(ends, costs, strict=True)]
        return float(min(ways))

    best, position, total = best_ways(ends, costs), 1, 0.0
    while position < 8:
        drafter = best[position]
        total += costs[drafter, position]
        position = int(ends[drafter, position])
    assert total == pytest.approx(cheapest(1))
    assert total <= min(way_cost(*row) for row in zip(ends, costs, strict=True)) + 1e-9


@pytest.mark.parametrize(("longest", "rounds"), [(7, 2), (5, 2), (1, 4), (0, 7)])
def test_rounds_of_one_drafter(longest: int, rounds: int) -> None:
    # Positions 1..7 with x_0 given: from 1, three match and one more comes; from 5, two and one more.
    runs = np.minimum([0, 3, 2, 1, 0, 2, 1, 0], longest)
    assert way_cost(np.minimum(np.arange(8) + runs + 1, 8), np.ones(8)) == rounds
