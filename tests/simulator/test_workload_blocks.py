"""Outputs longer than their recording: positions of the right domain, unbiased rounds, luck by request, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import random_runs, traces_of

from calibration.common.errors import ReplayError
from calibration.traces import TraceSet
from simulator.playback.replay import (
    BlockPool,
    Continuation,
    RecordedRuns,
    Replay,
    SequenceTable,
    Stretches,
    compile_replay,
    select_sequences,
)

DOMAINS = ("chat", "code", "maths")


def compiled(traces: TraceSet, *, block: int = 8, seed: int = 0) -> tuple[Replay, SequenceTable, np.ndarray]:
    sequences = select_sequences(traces, drafter="drafter")
    replay = compile_replay(traces, "drafter", sequences, slots=1, seed=seed, longest_draft=4, block_tokens=block)
    starts = np.concatenate(([0], np.cumsum(sequences.output_tokens)[:-1]))
    return replay, sequences, starts


def origin(replay: Replay, start: int, length: int) -> np.ndarray:
    return replay.positions(np.arange(start, start + length))


@settings(max_examples=80)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=9),
    block=st.integers(1, 40),
    extra=st.integers(1, 150),
    seed=st.integers(0, 2**63 - 1),
    request=st.integers(0, 2**40),
    sampled=st.booleans(),
)
def test_a_continuation_has_only_positions_of_its_domain(
    lengths: list[int], block: int, extra: int, seed: int, request: int, sampled: bool
) -> None:
    runs = [[0] * n for n in lengths]
    probabilities = [[0.5] * n for n in lengths] if sampled else None
    replay, sequences, starts = compiled(
        traces_of(runs, domains=DOMAINS, probabilities=probabilities), block=block, seed=seed
    )
    for sequence, recorded in enumerate(lengths):
        length = recorded + extra
        start = replay.open(sequence, request, length)
        where = origin(replay, start, length)
        # First as recorded, from its first to its last position.
        assert where[:recorded].tolist() == list(range(starts[sequence], starts[sequence] + recorded))
        owner = np.searchsorted(starts, where, side="right") - 1
        assert {sequences.domains[i] for i in owner.tolist()} == {sequences.domains[sequence]}
        t = where - starts[owner]
        # A draft starts at t >= 1: prefill has emitted x_0.
        assert (t[recorded:] >= 1).all()
        # Whole blocks of neighbours but for the last.
        longest = max(n for i, n in enumerate(lengths) if sequences.domains[i] == sequences.domains[sequence])
        size = min(block, longest - 1)
        for first in range(recorded, length, size):
            piece = where[first : first + size]
            assert np.diff(piece).tolist() == [1] * (len(piece) - 1)
            assert len(set(owner[first : first + size].tolist())) == 1
        replay.close(start)


def test_recorded_runs_are_kept_over_seams() -> None:
    rng = np.random.default_rng(1)
    runs = [random_runs(rng, 80, own_state=True) for _ in range(6)]
    proposals = [[n + 1 for n in row] for row in runs]
    replay, _, _ = compiled(traces_of(runs, proposals=proposals, domains=("chat",)))
    assert isinstance(replay, RecordedRuns)
    flat = [n for row in runs for n in row]
    start = replay.open(2, 7, 500)
    where = origin(replay, start, 500)
    assert replay.run_length[start : start + 500].tolist() == [flat[i] for i in where.tolist()]
    assert replay.proposal_length is not None
    assert replay.proposal_length[start : start + 500].tolist() == [flat[i] + 1 for i in where.tolist()]


def test_blocks_keep_away_from_the_end_of_a_recording_where_they_can() -> None:
    lengths = np.array([40, 17, 16, 5])
    starts = np.array([0, 40, 57, 73])
    pool = BlockPool("chat", starts, lengths, 8)
    first = pool.positions(80_000, np.random.default_rng(0)).reshape(-1, 8)[:, 0]
    # t = 1 .. T - 16: 24 starts in the first sequence, one in the second, none in the others; all equally likely.
    seen, counts = np.unique(first, return_counts=True)
    assert seen.tolist() == [*range(1, 25), 41]
    assert counts == pytest.approx(np.full(25, 400), abs=4.5 * 20)


@pytest.mark.parametrize(
    ("lengths", "block", "size", "starts"),
    [([9, 4], 8, 8, [1]), ([12, 9], 8, 8, [1, 2, 3, 4, 13]), ([5, 5, 3], 8, 4, [1, 6]), ([2], 32, 1, [1])],
)
def test_short_recordings_give_what_they_have(lengths: list[int], block: int, size: int, starts: list[int]) -> None:
    ends = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    pool = BlockPool("chat", ends, np.array(lengths), block)
    assert pool.block == size
    first = pool.positions(size * 500, np.random.default_rng(0)).reshape(-1, size)[:, 0]
    assert np.unique(first).tolist() == starts


def test_a_domain_without_positions_cannot_continue_anything() -> None:
    replay, _, _ = compiled(traces_of([[0], [0, 1, 0]], domains=("chat", "code")))
    with pytest.raises(
        ReplayError, match=r"domain 'chat': must have a sequence of at least 2 output tokens .* got at most 1"
    ):
        replay.open(0, 0, 5)


def walk(runs: np.ndarray, length: int, k: int) -> int:
    """Rounds that `length` tokens take, drafting k."""
    t, rounds = 1, 0
    while t < length:
        t += min(int(runs[t]), k) + 1
        rounds += 1
    return rounds


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("k", [2, 5])
def test_resampling_keeps_tokens_per_round(k: int, sampled: bool) -> None:
    """Independent acceptance a has (1 - a^(k+1)) / (1 - a) tokens a round (bonus included), resampled or not, to 1 %.

    Cutting runs at seams would lose (k = 5, a = 0.8, blocks of 32) about 5 %.
    """
    alpha, length = 0.8, 4000
    rng = np.random.default_rng(3)
    traces = iid_traces(alpha, rng, sequences=300, output_tokens=200)
    if sampled:
        traces = traces_of([[0] * 200] * 4, probabilities=[[alpha] * 200] * 4)
    replay, sequences, _ = compiled(traces, block=32)
    rounds = tokens = 0
    for request in range(60):
        start = replay.open(request % len(sequences), request, length)
        rounds += walk(replay.run_length[start : start + length], length, k)
        tokens += length - 1
        replay.close(start)
    assert tokens / rounds == pytest.approx((1 - alpha ** (k + 1)) / (1 - alpha), rel=0.01)


def test_blocks_keep_the_autocorrelation_that_single_positions_would_lose() -> None:
    """Acceptance in easy and hard stretches: neighbours agree within a block of 32, hardly in blocks of 1."""
    easy = np.repeat(np.random.default_rng(0).random(200) < 0.5, 50)
    runs = [np.where(easy, 1, 0)[i : i + 1000].tolist() for i in range(0, 10_000, 1000)]

    def agreement(block: int) -> float:
        replay, _, _ = compiled(traces_of(runs), block=block)
        start = replay.open(0, 1, 20_000)
        some = replay.run_length[start + 1000 : start + 20_000]
        return float((some[1:] == some[:-1]).mean())

    # Blocks of 32 in stretches of 50 with a coin each: 1/32 seams that agree by half, and half of 1/50 borders.
    assert agreement(32) == pytest.approx(1 - 0.5 / 32 - 0.5 / 50, abs=0.01)
    assert agreement(1) == pytest.approx(0.5, abs=0.03)


def luck(replay: Replay, sequence: int, request: int, length: int) -> list[int]:
    start = replay.open(sequence, request, length)
    return replay.run_length[start : start + length].tolist()


@pytest.mark.parametrize("sampled", [False, True])
def test_luck_belongs_to_the_request(sampled: bool) -> None:
    rng = np.random.default_rng(0)
    runs = [random_runs(rng, 50) for _ in range(5)]
    probabilities = [[0.5] * 50 for _ in range(5)] if sampled else None
    traces = traces_of(runs, probabilities=probabilities)
    one, other = compiled(traces)[0], compiled(traces)[0]
    luck(other, 3, 9, 400)
    assert luck(one, 1, 4, 300) == luck(other, 1, 4, 300)
    assert luck(one, 1, 4, 300) != luck(one, 1, 5, 300)
    assert luck(one, 1, 4, 300) != luck(compiled(traces, seed=1)[0], 1, 4, 300)
    # A longer output only goes on; drawn runs are cut by the end of the shorter one.
    assert luck(one, 1, 4, 300)[:180] == luck(one, 1, 4, 231)[:180]


def test_no_blocks_where_the_recording_is_long_enough() -> None:
    runs = [[0, 1, 0, 2, 1, 0], [3, 2, 1, 0]]
    replay, _, starts = compiled(traces_of(runs))
    for length in (None, 1, 3, 4):
        assert replay.open(1, 0, length) == starts[1]
        replay.close(int(starts[1]))
    assert len(replay.run_length) == 10


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 300)), min_size=1, max_size=60),
    st.integers(0, 100),
)
def test_stretches_never_overlap_and_are_reused(steps: list[tuple[bool, int]], first: int) -> None:
    room = Stretches(first)
    live: dict[int, int] = {}
    most = 0
    for take, length in steps:
        if take or not live:
            start = room.take(length)
            assert start >= first
            assert all(start + length <= s or s + n <= start for s, n in live.items())
            assert start + length <= room.end
            live[start] = length
        else:
            start = next(iter(live))
            room.give(start)
            del live[start]
        most = max(most, len(live))
    # Sizes are rounded up to powers of two; one free list for each of at most nine sizes.
    assert room.end - first <= most * sum(2**k for k in range(10))
    grown = room.fit(np.arange(5))
    assert len(grown) >= room.end
    assert grown[:5].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sampled", [False, True])
def test_memory_follows_live_requests_not_ended_ones(sampled: bool) -> None:
    runs: list[Any] = [[0] * 100] * 3
    probabilities = [[0.5] * 100] * 3 if sampled else None
    replay, _, _ = compiled(traces_of(runs, probabilities=probabilities))
    rng = np.random.default_rng(0)
    live: list[int] = []
    sizes = []
    for request in range(3000):
        live.append(replay.open(request % 3, request, int(rng.integers(101, 1000))))
        if len(live) > 10:
            replay.close(live.pop(0))
        sizes.append(len(replay.run_length))
    assert sizes[-1] == sizes[500]
    assert sizes[-1] <= 300 + 1.5 * 11 * 4 * 1024


def test_a_continuation_can_be_asked_directly() -> None:
    lengths = np.array([6, 9])
    continuation = Continuation(("chat", "chat"), np.array([0, 6]), lengths, 4, seed=2)
    assert continuation.longest == 9
    assert continuation.trajectory(1, 0, 3).tolist() == [6, 7, 8]
    assert len(continuation.trajectory(0, 0, 31)) == 31
