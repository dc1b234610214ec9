"""DSI's published model: its table, its exact means, and its order against serial and plain decoding."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from calibration.common.errors import CostError
from simulator.placement.servers import (
    PublishedModel,
    dsi_cost_per_token,
    dsi_costs,
    expected_dsi_cost,
    expected_si_cost,
    servers_needed,
    si_costs,
)

PUBLISHED = [(0.05, 0.8, 3, 390.0, 256.4), (0.1, 0.8, 5, 407.0, 329.0), (0.1, 0.9, 5, 320.2, 217.5)]
PUBLISHED += [(0.5, 0.5, 5, 1773.0, 946.0)]
RUNS = 200


@pytest.mark.parametrize(("step", "acceptance", "tokens", "serial", "dsi"), PUBLISHED)
def test_the_published_table_is_reproduced(
    step: float, acceptance: float, tokens: int, serial: float, dsi: float
) -> None:
    """Within three standard errors: those of the published means over 200 runs, and of ours beside them."""
    model = PublishedModel(step, acceptance, tokens)
    for draw, exact, published in (
        (si_costs, expected_si_cost(model), serial),
        (dsi_costs, expected_dsi_cost(model), dsi),
    ):
        costs = draw(model, RUNS, np.random.default_rng(1))
        error = costs.std(ddof=1) / np.sqrt(RUNS)
        assert 0.4 < error < 4.5, "standard errors must be .5 to 4"
        assert abs(exact - published) <= 3 * error
        assert abs(costs.mean() - published) <= 3 * np.sqrt(2) * error
        assert abs(costs.mean() - exact) <= 3 * error


def dsi_by_hand(match: list[bool], step: float, tokens: int) -> float:
    """One output, block by block as published: draft, reject or go on, and the cheaper of both ways."""
    out, cost = 0, 0.0
    while out < len(match):
        new, speculative = 0, 0.0
        while True:
            block = min(tokens, len(match) - 1 - out - new)
            speculative += block * step
            agreed = 0
            while agreed < block and match[out + new + agreed]:
                agreed += 1
            new += agreed
            if block == 0 or agreed < block:
                break
        new += 1
        cost += min(speculative + 1, new)
        out += new
    return cost


@pytest.mark.parametrize(("step", "tokens", "length"), [(0.05, 3, 40), (0.3, 2, 7), (0.6, 4, 25), (0.2, 1, 30)])
def test_the_exact_mean_agrees_with_outputs_played_block_by_block(step: float, tokens: int, length: int) -> None:
    rng = np.random.default_rng(3)
    played = [dsi_by_hand((rng.random(length) < 0.7).tolist(), step, tokens) for _ in range(4000)]
    error = np.std(played, ddof=1) / np.sqrt(len(played))
    assert abs(np.mean(played) - expected_dsi_cost(PublishedModel(step, 0.7, tokens, length))) <= 3 * error


def test_known_means() -> None:
    never, always = PublishedModel(0.1, 0.0, 5, 100), PublishedModel(0.1, 1.0, 5, 101)
    assert expected_dsi_cost(never) == pytest.approx(100), "every token is a correction"
    assert expected_si_cost(never) == pytest.approx(100 * 1.5 - 0.1 * (5 + 4 + 3 + 2 + 1))
    assert expected_dsi_cost(always) == pytest.approx(1 + 100 * 0.1), "drafting alone and one verification"
    assert expected_si_cost(always) == pytest.approx(16 * 1.5 + 1 + 0.4), "16 rounds give 6 tokens, one gives 5"
    assert dsi_costs(always, 3, np.random.default_rng(0)).tolist() == pytest.approx([11.0] * 3)
    assert expected_si_cost(PublishedModel(0.1, 0.5, 5, 1)) == expected_dsi_cost(PublishedModel(0.1, 0.5, 5, 1)) == 1


@pytest.mark.parametrize(("step", "acceptance", "tokens"), [row[:3] for row in PUBLISHED] + [(0.3, 0.6, 1)])
def test_long_outputs_cost_the_asymptote_a_token(step: float, acceptance: float, tokens: int) -> None:
    """What a token more costs, far from both ends."""
    short, long = (expected_dsi_cost(PublishedModel(step, acceptance, tokens, n)) for n in (800, 1000))
    limit = dsi_cost_per_token(PublishedModel(step, acceptance, tokens))
    assert (long - short) / 200 == pytest.approx(limit, rel=1e-9)


def test_the_asymptote_of_lookahead_one() -> None:
    for acceptance, step in product((0.0, 0.3, 0.9), (0.01, 0.2, 0.5)):
        expected = (1 - acceptance) + step * acceptance + step * acceptance * (1 - acceptance)
        assert dsi_cost_per_token(PublishedModel(step, acceptance, 1)) == pytest.approx(expected)
    assert dsi_cost_per_token(PublishedModel(0.2, 1.0, 4)) == pytest.approx(0.2)


def test_dsi_never_loses_to_serial_or_to_none() -> None:
    """In the mean, exactly, wherever the model is defined."""
    for step, acceptance, tokens, length in product(
        (0.01, 0.1, 0.5, 0.9), (0.0, 0.2, 0.8, 0.99, 1.0), (1, 2, 5, 10), (1, 2, 60)
    ):
        model = PublishedModel(step, acceptance, tokens, length)
        assert expected_dsi_cost(model) <= min(expected_si_cost(model), length) + 1e-9


def test_servers_needed() -> None:
    assert PublishedModel(0.1, 0.5, 5).servers == 2
    assert PublishedModel(0.01, 0.5, 10).servers == 10, "exactly: rounding adds none"
    assert PublishedModel(0.011, 0.5, 10).servers == 10
    assert servers_needed(2.0, 0.1) == 20
    assert servers_needed(1.0, 5.0) == 1


@pytest.mark.parametrize(
    ("values", "name"),
    [((0.0, 0.5, 5), "draft_step"), ((0.1, 1.5, 5), "acceptance"), ((0.1, 0.5, 0), "draft_tokens")],
)
def test_what_is_no_model_is_refused(values: tuple[float, float, int], name: str) -> None:
    with pytest.raises(CostError, match=f"{name}: must be"):
        PublishedModel(*values)
