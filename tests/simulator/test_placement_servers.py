"""Many target servers (DSI) against every token's earliest time, and against serial and plain decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import iid_traces, run_lengths
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import scenario, traces_of

from calibration.traces import TraceSet
from simulator import RunResult, simulate
from simulator.placement.servers import PublishedModel, dsi_cost_per_token

DSI = {"kind": "many_servers"}


def costs(verify_s: float, step_s: float, per_token_s: float = 0.0, overhead_s: float = 0.0) -> dict[str, Any]:
    return {
        "overhead_s": overhead_s,
        "verifier": {"kind": "linear", "base_s": verify_s, "per_token_s": per_token_s},
        "drafter": {"kind": "linear", "base_s": step_s},
    }


def traces(bits: list[list[bool]]) -> TraceSet:
    return traces_of([run_lengths(np.array(match)).tolist() for match in bits], prompts=[1] * len(bits))


def decoding_s(run: RunResult) -> list[float]:
    table = run.requests
    return (table["finish_s"].to_numpy() - table["first_token_s"].to_numpy()).tolist()


def earliest(match: list[bool], tokens: int, plain_s: float, verify_s: float, block_s: float) -> float:
    """When the last token is known, token by token. `match[p]`: the drafter agrees with token p.

    Token 0 is there at time 0. A stretch begins behind the last token that was not drafted right.
    """
    when, begin = [0.0], 0
    for place in range(1, len(match)):
        behind = place - 1 - begin  # drafted tokens of this stretch, all of them right, before this one
        blocks = next(i for i in range(behind + 1) if i * tokens >= behind)
        when.append(min(when[-1] + plain_s, when[begin] + blocks * block_s + verify_s))
        if not match[place]:
            begin = place
    return when[-1]


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    alpha=st.sampled_from([0.0, 0.4, 0.9, 1.0]),
    tokens=st.integers(1, 6),
    step_s=st.sampled_from([0.003, 0.011, 0.02, 0.049, 0.09, 0.3]),
    overhead_s=st.sampled_from([0.0, 0.004]),
    per_token_s=st.sampled_from([0.0, 0.002]),
)
def test_one_request_ends_when_its_last_token_can_first_be_known(
    seed: int, alpha: float, tokens: int, step_s: float, overhead_s: float, per_token_s: float
) -> None:
    """And so never later, on common random numbers, than under serial placement or without drafting."""
    rng = np.random.default_rng(seed)
    match = (rng.random(int(rng.integers(2, 60))) < alpha).tolist()
    prices = costs(0.1, step_s, per_token_s, overhead_s)
    dsi, serial, none = (
        decoding_s(simulate(scenario(k, batch=1, costs=prices, placement=placement), traces([match])))[0]
        for k, placement in ((tokens, DSI), (tokens, None), (None, None))
    )
    plain_s = 0.1 + per_token_s + overhead_s
    expected = earliest(match, tokens, plain_s, plain_s + tokens * per_token_s, tokens * step_s)
    assert dsi == pytest.approx(expected)
    assert dsi <= min(serial, none) * (1 + 1e-9)
    assert none == pytest.approx((len(match) - 1) * plain_s)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    alpha=st.sampled_from([0.3, 0.8, 1.0]),
    tokens=st.integers(0, 5),
    step_s=st.sampled_from([0.004, 0.03, 0.15]),
)
def test_in_a_batch_nobody_ends_later_than_without_drafting(
    seed: int, alpha: float, tokens: int, step_s: float
) -> None:
    """Nor than under serial placement by more than a plain step: tokens are seen at common ends of rounds."""
    rng = np.random.default_rng(seed)
    bits = [(rng.random(int(n)) < alpha).tolist() for n in rng.integers(1, 40, 7)]
    prices = costs(0.1, step_s)
    dsi, serial, none = (
        np.array(decoding_s(simulate(scenario(k, batch=7, costs=prices, placement=placement), traces(bits))))
        for k, placement in ((tokens, DSI), (tokens, None), (None, None))
    )
    assert (dsi <= none + 1e-9).all()
    assert (dsi <= serial + 0.1 + 1e-9).all()


def test_against_the_published_model() -> None:
    """The published model charges the rejected block's drafting even where nothing of it is needed: it costs more."""
    model = PublishedModel(0.1, 0.8, 3)
    recorded = iid_traces(0.8, np.random.default_rng(2), sequences=12, output_tokens=1000)
    run = simulate(scenario(3, batch=1, costs=costs(1.0, 0.1), placement=DSI), recorded)
    per_token = np.array(decoding_s(run)) / 999
    # Stretches of n accepted tokens cost 1 + ceil(n / k) k c; the published ones 1 + (floor(n / k) + 1) k c, n >= 1.
    n = np.arange(400)
    exact = 0.2 * np.sum(0.2 * 0.8**n * (1 + 0.3 * np.ceil(n / 3)))
    error = per_token.std(ddof=1) / np.sqrt(len(per_token))
    assert abs(per_token.mean() - exact) <= 3 * error
    assert exact < dsi_cost_per_token(model) < 1.1 * exact


@pytest.mark.parametrize(("servers", "every_s"), [(1, 0.1), (2, 0.05), (4, 0.025), (5, 0.02), (None, 0.02)])
def test_blocks_wait_for_servers_where_these_are_few(servers: int | None, every_s: float) -> None:
    """Everything accepted, blocks of 2 tokens drafted in 0.02 s and verified in 0.1 s: five servers are enough."""
    placement = DSI if servers is None else {**DSI, "servers": servers}
    run = simulate(scenario(2, batch=1, costs=costs(0.1, 0.01), placement=placement), traces([[True] * 41]))
    # Token 40 is the first behind 39 drafted ones: 20 blocks. One server that decodes plainly gives 40 steps.
    assert decoding_s(run) == pytest.approx([0.1 + 20 * every_s])
    assert decoding_s(run)[0] <= 40 * 0.1


def test_rounds_tell_what_was_compared_and_how_long_servers_were_busy() -> None:
    match = [True, True, True, True, False, True, True]
    run = simulate(scenario(2, batch=1, costs=costs(0.1, 0.02), placement=DSI), traces([match]))
    rounds = run.iterations.slice(1)
    # Tokens 1 | 2 3 | 4 (replaced) at 0.1, 0.14, 0.18; then 5 at 0.28, and 6 with the block at 0.32.
    assert rounds["duration_s"].to_numpy() == pytest.approx([0.1, 0.04, 0.04, 0.1, 0.04])
    assert rounds["emitted_tokens"].to_pylist() == [1, 2, 1, 1, 1]
    assert rounds["drafted_tokens"].to_pylist() == [1, 2, 1, 1, 1]
    assert rounds["accepted_tokens"].to_pylist() == [1, 2, 0, 1, 1]


def test_what_prices_were_does_not_come_back_when_they_change() -> None:
    """Drafting for two takes twice as long as for one: the one that stays speeds up, from then on."""
    prices = costs(0.1, 0.0)
    prices["drafter"] = {"kind": "linear", "base_s": 0.0, "per_token_s": 0.01}
    run = simulate(scenario(2, batch=2, costs=prices, placement=DSI), traces([[True] * 101, [True] * 201]))
    rounds = run.iterations.slice(1)
    both = rounds["active"].to_numpy() == 2
    length, emitted = (rounds[name].to_numpy() for name in ("duration_s", "emitted_tokens"))
    assert both.sum() == 51, "100 tokens behind the first: one plain, and 49 and a half blocks"
    assert length[both] == pytest.approx([0.1] + [0.04] * 50)
    assert emitted[both].tolist() == [2] + [4] * 49 + [3]
    assert length[~both] == pytest.approx([0.02] * 50, abs=1e-9)
    assert emitted[~both].max() == 2


@pytest.mark.parametrize("lengths", [(2, 5), (5, 2)])
def test_a_stretch_keeps_the_draft_length_of_its_beginning(lengths: tuple[int, int]) -> None:
    """The table asks for other lengths when the batch shrinks; blocks under way are not cut anew."""
    table = [[1, 1, lengths[0]], [2, 2, lengths[1]]]
    bits = [[True] * 12, [True] * 30 + [False] + [True] * 20]
    stopping = {"policy": "by_batch", "table": table}
    run = simulate(scenario(batch=2, costs=costs(0.1, 0.01), placement=DSI, stopping=stopping), traces(bits))
    emitted = run.iterations.slice(1).filter(run.iterations.slice(1)["active"].to_numpy() == 1)["emitted_tokens"]
    largest = emitted.to_numpy()
    assert set(largest) <= {1, *lengths, *range(1, max(lengths) + 1)}
    before = largest[: np.flatnonzero(np.cumsum(largest) >= 18)[0]]
    assert before.max() == lengths[1], "still the blocks of two requests"
    assert largest[-4:].max() == lengths[0], "and then those of one"
