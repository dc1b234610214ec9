"""Optimal stopping against brute force, closed forms and what theory says of it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.cascade import switch_points
from analysis.cascade.published import (
    COSTS,
    LAMBDAS,
    QUALITIES,
    best_stage,
    first_possible_lambda,
    mixing_quality,
    published_facts,
)
from analysis.cascade.stopping import STOP, Move, Node, Ran, continue_above, sequential_nodes, solve
from calibration.common.arrays import Floats
from calibration.common.errors import ReplayError


def law(rng: np.random.Generator, stages: int, values: int) -> Floats:
    """A random joint law of signals (`values` each) and correctness (0, 1): axes s_1..s_L, q_1..q_L."""
    shape = (values,) * stages + (2,) * stages
    return rng.dirichlet(np.full(int(np.prod(shape)), 0.3)).reshape(shape)


def expected_quality(joint: Floats, ran: Ran, stage: int, seen: tuple[int, ...]) -> tuple[float, float]:
    """(chance of having seen `seen` after `ran`, chance that `stage` is correct then), from the joint law."""
    stages = joint.ndim // 2
    where: list[int | slice] = [slice(None)] * joint.ndim
    for at, value in zip(ran, seen, strict=True):
        where[at] = value
    reached = joint[tuple(where)].sum()
    where[stages + stage] = 1
    return float(reached), float(joint[tuple(where)].sum() / reached)


def as_nodes(
    joint: Floats, costs: tuple[float, ...], sets: list[Ran], follow: dict[Ran, list[int]]
) -> dict[Ran, Node]:
    """The decision problem whose states are whole histories; the answer is the best of the stages that ran."""
    values = joint.shape[0]
    nodes = {}
    for ran in sets:
        histories = list(product(range(values), repeat=len(ran)))
        best = [max(expected_quality(joint, ran, i, h)[1] for i in ran) for h in histories] if ran else None
        moves = []
        for j in follow[ran]:
            then = tuple(sorted((*ran, j)))
            chances = np.zeros((len(histories), values ** len(then)))
            for row, h in enumerate(histories):
                for value in range(values):
                    known = {**dict(zip(ran, h, strict=True)), j: value}
                    later = tuple(known[i] for i in then)
                    column = sum(v * values ** (len(then) - 1 - k) for k, v in enumerate(later))
                    chances[row, column] = (
                        expected_quality(joint, then, 0, later)[0] / expected_quality(joint, ran, 0, h)[0]
                    )
            moves.append(Move(j, np.full(len(histories), costs[j]), chances))
        nodes[ran] = Node(None if best is None else np.array(best), tuple(moves))
    return nodes


def brute_force(joint: Floats, costs: tuple[float, ...], follow: dict[Ran, list[int]], lam: float) -> float:
    """The best expected utility over all deterministic policies, each played out on every outcome."""
    stages, values = joint.ndim // 2, joint.shape[0]
    places: dict[tuple[Ran, tuple[int, ...]], list[int]] = {}
    for ran, following in follow.items():
        for history in product(range(values), repeat=len(ran)):
            places[ran, history] = [*([STOP] if ran else []), *following]
    outcomes = [
        (index[:stages], float(p)) for index, p in np.ndenumerate(joint.sum(axis=tuple(range(stages, 2 * stages))))
    ]
    best = -np.inf
    for actions in product(*places.values()):
        policy = dict(zip(places, actions, strict=True))
        total = 0.0
        for signals, p in outcomes:
            ran: Ran = ()
            paid = 0.0
            while (do := policy[ran, tuple(signals[i] for i in ran)]) != STOP:
                paid += costs[do]
                ran = tuple(sorted((*ran, do)))
            seen = tuple(signals[i] for i in ran)
            total += p * (lam * max(expected_quality(joint, ran, i, seen)[1] for i in ran) - paid)
        best = max(best, total)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_routing_optimum_is_that_of_brute_force(seed: int) -> None:
    """Two stages in any order, three signals each: 128 policies, each played out on all 9 outcomes."""
    rng = np.random.default_rng(seed)
    joint, costs = law(rng, 2, 3), tuple(rng.uniform(0.1, 1.5, 2).tolist())
    follow: dict[Ran, list[int]] = {(): [0, 1], (0,): [1], (1,): [0], (0, 1): []}
    nodes = as_nodes(joint, costs, list(follow), follow)
    for lam in (0.5, 2.0, 5.0, 20.0):
        assert solve(nodes, lam).value[()][0] == pytest.approx(brute_force(joint, costs, follow, lam), abs=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_the_sequential_optimum_is_that_of_brute_force(seed: int) -> None:
    """Three stages, two signals each, answers of the last stage: all 64 policies over histories."""
    rng = np.random.default_rng(seed)
    joint, costs = law(rng, 3, 2), tuple(rng.uniform(0.1, 1.0, 3).tolist())
    states = {k: list(product((0, 1), repeat=k)) for k in range(4)}
    reach = {h: expected_quality(joint, tuple(range(k)), 0, h)[0] for k in states for h in states[k]}
    right = {h: expected_quality(joint, tuple(range(k)), k - 1, h)[1] for k in (1, 2, 3) for h in states[k]}
    qualities = [np.array([right[h] for h in states[k]]) for k in (1, 2, 3)]
    chances = [
        np.array([[reach[t] / reach[h] if t[:-1] == h else 0.0 for t in states[k + 1]] for h in states[k]])
        for k in (0, 1, 2)
    ]
    nodes = sequential_nodes(costs, qualities, chances)
    for lam in (0.5, 2.0, 6.0):
        best = -np.inf
        early = states[1] + states[2]
        for stops in product((True, False), repeat=len(early)):
            stop = dict(zip(early, stops, strict=True))
            total = 0.0
            for h in states[3]:
                at = next((k for k in (1, 2) if stop[h[:k]]), 3)
                total += reach[h] * (lam * right[h[:at]] - sum(costs[:at]))
            best = max(best, total)
        assert solve(nodes, lam).value[()][0] == pytest.approx(best, abs=1e-10)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 1)), min_size=1, max_size=5),
    st.floats(0, 200),
)
def test_known_qualities_give_the_closed_form(stages: list[tuple[float, float]], lam: float) -> None:
    """Without anything to learn, V_0 = max_i lambda Q_i - (C_1 + ... + C_i)."""
    costs, qualities = [c for c, _ in stages], [q for _, q in stages]
    nodes = sequential_nodes(costs, [np.array([q]) for q in qualities], [np.ones((1, 1))] * len(costs))
    closed = max(lam * q - sum(costs[: i + 1]) for i, q in enumerate(qualities))
    assert solve(nodes, lam).value[()][0] == pytest.approx(closed, abs=1e-9)


def chain(seed: int) -> dict[Ran, Node]:
    """Three stages with five states each, at random."""
    rng = np.random.default_rng(seed)
    chances = [rng.dirichlet(np.ones(5), size=1 if i == 0 else 5) for i in range(3)]
    return sequential_nodes((1.0, 2.0, 4.0), [np.sort(rng.random(5)) for _ in range(3)], chances)


@pytest.mark.parametrize("seed", range(5))
def test_a_state_runs_on_above_one_lambda_and_never_stops_again(seed: int) -> None:
    nodes = chain(seed)
    for ran in ((0,), (0, 1)):
        grid = np.geomspace(0.1, 1e4, 80)
        on = np.array([solve(nodes, lam).action[ran] != STOP for lam in grid])
        assert (np.diff(on.astype(int), axis=0) >= 0).all()
        for state, at in enumerate(continue_above(nodes, ran, 1e4)):
            expected = grid > at if at is not None else np.zeros(len(grid), dtype=bool)
            np.testing.assert_array_equal(on[:, state], expected)


def test_costs_already_paid_change_nothing() -> None:
    """The first stage at a hundred times its cost: all actions stay, only the value at the start falls by it."""
    nodes = chain(0)
    dear = {**nodes, (): Node(None, (Move(0, np.array([100.0]), nodes[()].moves[0].chances),))}
    one, other = solve(nodes, 8.0), solve(dear, 8.0)
    for ran in nodes:
        np.testing.assert_array_equal(one.action[ran], other.action[ran])
    assert one.value[()][0] - other.value[()][0] == pytest.approx(99.0)


def test_what_cannot_be_solved_is_refused() -> None:
    with pytest.raises(ReplayError, match="sum to 1"):
        solve(sequential_nodes((1.0,), [np.array([0.5, 0.7])], [np.array([[0.5, 0.4]])]), 1.0)
    with pytest.raises(ReplayError, match="need an answer"):
        solve({(): Node(None, ())}, 1.0)
    with pytest.raises(ReplayError, match="lambda: must be 0 or more, got -1"):
        solve(chain(0), -1.0)


def test_the_published_example_switches_at_26_and_46() -> None:
    found = switch_points(COSTS, QUALITIES)
    assert [one.stage for one in found] == [0, 1, 2]
    assert [one.from_lambda for one in found] == pytest.approx([0, 26, 46])


@settings(max_examples=80)
@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0.01, 500))
def test_the_envelope_is_the_best_line_everywhere(stages: list[tuple[float, float]], lam: float) -> None:
    costs, qualities = [c for c, _ in stages], [q for _, q in stages]
    found = switch_points(costs, qualities)
    mine = [one.stage for one in found if one.from_lambda <= lam][-1]
    best = max(lam * q - c for c, q in stages)
    assert lam * qualities[mine] - costs[mine] == pytest.approx(best, rel=1e-9, abs=1e-7)
    assert [one.from_lambda for one in found] == sorted(one.from_lambda for one in found)


@settings(max_examples=200)
@given(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), st.sampled_from(LAMBDAS))
def test_at_the_published_lambdas_70b_is_never_best_and_34b_only_across_a_wide_gap(
    qualities: tuple[float, float, float], lam: float
) -> None:
    """Whatever the qualities: the largest model's extra cost exceeds lambda <= 5 times any gain."""
    once = int(np.argmax([lam * q - c for q, c in zip(qualities, COSTS, strict=True)]))
    sequential = best_stage(COSTS, qualities, lam)
    assert once != 2
    assert sequential != 2
    if qualities[1] - qualities[0] <= 0.52:
        assert once == 0
        assert sequential == 0


def test_facts_about_the_published_system() -> None:
    facts = published_facts()
    assert facts.optimum == ("13B",) * 4
    assert facts.impossible_below_once == pytest.approx((0, 2.6, 7.2))
    assert facts.impossible_below_sequential == pytest.approx((0, 4.2, 13.0))
    assert first_possible_lambda((3.0, 1.0), sequential=False) == (2.0, 0.0)
    assert facts.gap_needed_once == pytest.approx(0.52)
    assert facts.gap_needed_sequential == pytest.approx(0.84)
    shares = {one.lam: one.share for one in facts.reach}
    drawn = 0.7 + 0.05 * np.arange(3) + 0.02 * np.random.default_rng(0).normal(size=(200_000, 3))
    assert shares[1.0] == pytest.approx((drawn <= 0.85).all(axis=1).mean(), abs=1e-3)
    assert shares[0.5] == pytest.approx((drawn <= 0.75).all(axis=1).mean(), abs=1e-3)
    assert shares[1.0] == pytest.approx(0.994, abs=5e-4)


def test_mixing_reaches_the_upper_hull() -> None:
    """Stages (1, .2), (2, .3), (4, .8), (5, .7): the second and the last lie below the hull."""
    costs, qualities = np.array([1.0, 2, 4, 5]), np.array([0.2, 0.3, 0.8, 0.7])
    at = np.array([1.0, 2.0, 2.5, 4.0, 9.0])
    found = [mixing_quality(costs, qualities, np.array(c)) for c in at]
    assert np.array(found) == pytest.approx([0.2, 0.4, 0.5, 0.8, 0.8])
    assert np.isnan(mixing_quality(costs, qualities, np.array(0.5)))
