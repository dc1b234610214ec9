"""PEARL and AMUSD against their descriptions played token by token, and against PEARL's two-mode chain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import iid_traces, run_lengths
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import scenario, traces_of

from calibration.common.errors import CostError
from calibration.traces import TraceSet
from simulator import RunResult, simulate

STEP_S, OVERHEAD_S = 0.01, 0.002


def costs(verify_s: float, step_s: float = STEP_S, overhead_s: float = OVERHEAD_S) -> dict[str, Any]:
    return {
        "overhead_s": overhead_s,
        "verifier": {"kind": "linear", "base_s": verify_s},
        "drafter": {"kind": "linear", "base_s": step_s},
    }


def bits_of(rng: np.random.Generator, number: int, alpha: float, longest: int = 40) -> list[list[bool]]:
    return [(rng.random(int(n)) < alpha).tolist() for n in rng.integers(1, longest, number)]


def traces(bits: list[list[bool]], **more: Any) -> TraceSet:
    return traces_of([run_lengths(np.array(match)).tolist() for match in bits], **more)


def decoding_s(run: RunResult) -> list[float]:
    """Seconds from the first token of each request to its last, without those that others' prefills took."""
    table = run.requests
    return (table["finish_s"].to_numpy() - table["first_token_s"].to_numpy()).tolist()


# --- PEARL as its code runs: a prefix whose last tokens may be unverified, and two modes.


def pearl(match: list[bool], gamma: int) -> list[int]:
    """Tokens of the text known after each round. A token is its flag: whether it is the verifier's."""
    text = len(match)
    prefix, pre, known = [True], True, [1]
    while known[-1] < text:
        drafts: list[bool] = []
        for place in range(len(prefix), len(prefix) + gamma):
            # A drafter on a wrong prefix drafts tokens that nobody will look at.
            drafts.append(all(prefix) and all(drafts) and place < text and match[place])
        if pre:
            prefix, pre = (prefix + drafts, False) if drafts[0] else ([*prefix, True], True)
            known.append(known[-1] + 1)
            continue
        pending = gamma - 1
        row = [*prefix[len(prefix) - pending :], drafts[0]] if pending else [drafts[0]]
        agreed = row.index(False) if False in row else gamma
        if agreed == gamma:
            prefix += drafts
            known.append(known[-1] + gamma)
        else:
            prefix, pre = [*prefix[: len(prefix) - pending + agreed], True], True
            known.append(known[-1] + agreed + 1)
    return [min(n, text) for n in known]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    alpha=st.sampled_from([0.1, 0.6, 0.95, 1.0]),
    gamma=st.integers(1, 6),
    verify_s=st.sampled_from([0.004, 0.03, 0.2]),
)
def test_overlapped_rounds_are_those_of_pearls_code(seed: int, alpha: float, gamma: int, verify_s: float) -> None:
    bits = bits_of(np.random.default_rng(seed), 6, alpha)
    run = simulate(scenario(gamma, batch=6, costs=costs(verify_s), placement={"kind": "overlapped"}), traces(bits))
    rounds = [len(pearl(match, gamma)) - 1 for match in bits]
    assert run.requests["rounds"].to_pylist() == rounds
    round_s = max(gamma * STEP_S, verify_s) + OVERHEAD_S
    assert decoding_s(run) == pytest.approx([n * round_s for n in rounds])


@pytest.mark.parametrize(("alpha", "gamma"), [(0.8, 4), (0.5, 3), (0.9, 2)])
def test_tokens_per_round_are_those_of_pearls_two_mode_chain(alpha: float, gamma: int) -> None:
    """pi_post = a / (a + 1 - a^gamma); tokens per round = pi_pre + pi_post (1 - a^gamma) / (1 - a)."""
    recorded = iid_traces(alpha, np.random.default_rng(7), sequences=16, output_tokens=1500)
    run = simulate(scenario(gamma, batch=16, costs=costs(0.03), placement={"kind": "overlapped"}), recorded)
    post = alpha / (alpha + 1 - alpha**gamma)
    expected = (1 - post) + post * (1 - alpha**gamma) / (1 - alpha)
    tokens = 1499 / run.requests["rounds"].to_numpy()
    error = tokens.std(ddof=1) / np.sqrt(len(tokens))
    assert abs(tokens.mean() - expected) <= 3 * error
    assert error < 0.02 * expected


def test_a_step_that_takes_gamma_draft_steps_makes_the_asynchronous_placement_pearl() -> None:
    recorded = iid_traces(0.75, np.random.default_rng(9), sequences=12, output_tokens=150)
    gamma = 4
    verify_s = gamma * STEP_S - OVERHEAD_S  # the drafter drafts during the overhead as well
    runs = [
        simulate(scenario(gamma, batch=5, costs=costs(verify_s), placement={"kind": kind}), recorded)
        for kind in ("overlapped", "asynchronous")
    ]
    for column in ("emitted_tokens", "accepted_tokens", "drafted_tokens"):
        assert runs[0].iterations[column].equals(runs[1].iterations[column])


# --- AMUSD in continuous time: one verifier pass after the other, a drafter that only ever works.


def amusd(match: list[bool], verify_s: float, step_s: float) -> int:
    """Passes until the whole text is known."""
    text, known, passes = len(match), 1, 0
    draft: list[bool] = []
    step_ends, void = step_s, False
    now = 0.0
    while known < text:
        window, end = len(draft), now + verify_s
        while step_ends <= end + 1e-12:
            if void:
                void = False
            else:
                place = known + len(draft)
                draft.append(all(draft) and place < text and match[place])
            step_ends += step_s
        in_step = step_ends - step_s < end - 1e-12
        agreed = draft[:window].index(False) if False in draft[:window] else window
        known += agreed + 1
        if agreed == window and len(draft) > window and draft[window]:
            draft = draft[window + 1 :]
        else:
            draft, void = [], in_step
        now, passes = end, passes + 1
    return passes


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    alpha=st.sampled_from([0.3, 0.8, 0.97]),
    verify_s=st.sampled_from([0.004, 0.013, 0.03, 0.077, 0.1]),
)
def test_asynchronous_passes_are_those_of_two_processes_that_never_wait(
    seed: int, alpha: float, verify_s: float
) -> None:
    (match,) = bits_of(np.random.default_rng(seed), 1, alpha, longest=60)
    prices = costs(verify_s - OVERHEAD_S)
    run = simulate(scenario(64, batch=1, costs=prices, placement={"kind": "asynchronous"}), traces([match]))
    passes = amusd(match, verify_s, STEP_S)
    assert run.requests["rounds"].to_pylist() == [passes]
    assert decoding_s(run) == pytest.approx([passes * verify_s])


def test_the_drafter_of_an_asynchronous_placement_stops_at_the_draft_length() -> None:
    """With everything accepted and a drafter that could draft 20: k a pass, of which one is the pass's own token."""
    run = simulate(
        scenario(3, batch=1, costs=costs(20 * STEP_S), placement={"kind": "asynchronous"}), traces([[True] * 31])
    )
    assert run.iterations["emitted_tokens"].to_pylist() == [1] + [1] + [3] * 9 + [2]
    assert run.iterations["draft_s"].to_numpy()[1:] == pytest.approx(3 * STEP_S)


def test_a_free_drafter_drafts_all_it_may() -> None:
    free = costs(0.1, step_s=0.0)
    run = simulate(scenario(5, batch=1, costs=free, placement={"kind": "asynchronous"}), traces([[True] * 12]))
    assert run.iterations["emitted_tokens"].to_pylist() == [1, 1, 5, 5]


def test_the_asynchronous_placement_needs_a_drafter_with_steps() -> None:
    prices = costs(0.1) | {"drafter": {"kind": "linear", "base_s": 0.01, "charged": "per_round"}}
    with pytest.raises(CostError, match=r"costs\.drafter: must be charged per_step"):
        simulate(scenario(5, costs=prices, placement={"kind": "asynchronous"}), traces([[True] * 12]))


@pytest.mark.parametrize("kind", ["overlapped", "asynchronous"])
def test_a_new_request_knows_nothing_of_the_one_before_in_its_slot(kind: str) -> None:
    """Served after another in one slot, a request takes as many rounds as alone (draft steps never overlap here)."""
    bits = bits_of(np.random.default_rng(4), 8, 0.85)
    prices = costs(3 * STEP_S - OVERHEAD_S)
    together = simulate(scenario(3, batch=1, costs=prices, placement={"kind": kind}), traces(bits))
    alone = [
        simulate(scenario(3, batch=1, costs=prices, placement={"kind": kind}), traces([match])) for match in bits
    ]
    assert together.requests["rounds"].to_pylist() == [run.requests["rounds"].to_pylist()[0] for run in alone]
