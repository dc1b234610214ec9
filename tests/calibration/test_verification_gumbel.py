"""Drafting: Gumbel-top-k and stochastic beam search against the exact law of draws without replacement."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from enumeration import chi_square_p_value, distributions, without_replacement_tuples
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.common.errors import CalibrationError
from calibration.verification import (
    BeamNode,
    Recursive,
    draw_drafts,
    draw_iid,
    gumbel_top_k,
    inclusion_probabilities,
    stochastic_beam_search,
    top_k,
    without_replacement_probability,
)
from calibration.verification.race import prefix_probabilities

Q = np.array([0.5, 0.0, 0.2, 0.2, 0.1])
NEXT = {
    (): np.array([0.6, 0.3, 0.1]),
    (0,): np.array([0.2, 0.5, 0.3]),
    (1,): np.array([0.9, 0.1, 0.0]),
    (2,): np.array([0.1, 0.1, 0.8]),
}


def fits(drawn: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> bool:
    assert set(drawn) <= set(law)
    keys = list(law)
    return chi_square_p_value(np.array([drawn[key] for key in keys]), np.array([law[key] for key in keys])) > 1e-3


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_gumbel_top_k_draws_without_replacement_in_order(k: int) -> None:
    rng = np.random.default_rng(k)
    drawn = Counter(tuple(gumbel_top_k(Q, k, rng).tolist()) for _ in range(6000))
    law = dict(without_replacement_tuples(Q, k))
    assert fits(drawn, law)
    for drafts, weight in law.items():
        assert without_replacement_probability(Q, drafts) == pytest.approx(weight, rel=1e-12)


def test_independent_draws_and_a_wrong_order_fail_the_same_test() -> None:
    rng = np.random.default_rng(0)
    law = dict(without_replacement_tuples(Q, 2))
    backwards = Counter(tuple(gumbel_top_k(Q, 2, rng).tolist()[::-1]) for _ in range(6000))
    assert not fits(backwards, law)
    independent = Counter(int(x) for _ in range(2000) for x in draw_iid(Q, 3, rng))
    assert chi_square_p_value(np.array([independent[x] for x in range(5)]), Q) > 1e-3


def test_top_k_breaks_ties_by_id_and_leaves_out_the_impossible() -> None:
    assert top_k(Q, 3).tolist() == [0, 2, 3]
    assert top_k(Q, 9).tolist() == [0, 2, 3, 4]
    assert draw_drafts(Q, 2, np.random.default_rng(0), "top").tolist() == [0, 2]
    even = np.full(7, 1 / 7)
    assert top_k(even, 4).tolist() == [0, 1, 2, 3]


@settings(max_examples=150)
@given(q=distributions(5), k=st.integers(1, 5), order=st.permutations(range(5)))
def test_the_race_gives_exact_inclusion_and_prefix_probabilities(q: np.ndarray, k: int, order: list[int]) -> None:
    included, inside = np.zeros(5), np.zeros(6)
    for drafts, weight in without_replacement_tuples(q, k):
        included[list(drafts)] += weight
        inside[1 + max(order.index(x) for x in drafts) :] += weight
    np.testing.assert_allclose(inclusion_probabilities(q, k), included, atol=1e-12)
    np.testing.assert_allclose(prefix_probabilities(q, k, np.array(order)), inside, atol=1e-12)


def test_inclusion_probabilities_sum_to_k_on_a_large_vocabulary() -> None:
    rng = np.random.default_rng(1)
    q = rng.dirichlet(np.full(5000, 0.02))
    for k in (2, 3, 5):
        included = inclusion_probabilities(q, k)
        assert included.sum() == pytest.approx(k, abs=1e-10)
        assert included.max() <= 1.0


def joint() -> dict[tuple[int, ...], float]:
    return {(a, b): float(NEXT[()][a] * NEXT[(a,)][b]) for a, b in product(range(3), repeat=2)}


def last_level(nodes: list[BeamNode]) -> tuple[tuple[int, ...], ...]:
    return tuple(node.tokens for node in nodes if len(node.tokens) == 2)


def test_stochastic_beams_are_sequences_drawn_without_replacement() -> None:
    rng = np.random.default_rng(3)
    sequences = list(joint())
    weights = np.array([joint()[s] for s in sequences])
    law = {tuple(sequences[i] for i in row): w for row, w in without_replacement_tuples(weights, 2)}
    drawn = Counter(last_level(stochastic_beam_search(lambda s: NEXT[s], 2, 2, rng)) for _ in range(8000))
    assert set(drawn) <= set(law)
    keys = list(law)
    counts, expected = np.array([drawn[key] for key in keys]), np.array([law[key] for key in keys])
    assert chi_square_p_value(counts, expected) > 1e-3
    included = {s: sum(n for beam, n in drawn.items() if s in beam) / 8000 for s in sequences}
    exact = inclusion_probabilities(weights, 2)
    assert [included[s] for s in sequences] == pytest.approx(exact.tolist(), abs=0.03)


def test_beam_nodes_hang_together() -> None:
    nodes = stochastic_beam_search(lambda s: NEXT[s], 3, 2, np.random.default_rng(4))
    assert [len(node.tokens) for node in nodes] == [1, 1, 1, 2, 2, 2]
    for node in nodes:
        above = nodes[node.parent] if node.parent >= 0 else BeamNode((), -1, 0.0, 0.0)
        assert node.tokens[:-1] == above.tokens
        assert node.perturbed <= above.perturbed + 1e-12
        step = NEXT[above.tokens][node.tokens[-1]]
        assert node.log_probability == pytest.approx(above.log_probability + np.log(step), abs=1e-12)
    values = [node.perturbed for node in nodes[3:]]
    assert values == sorted(values, reverse=True)


def test_recursive_rejection_verifies_stochastic_beams_without_loss() -> None:
    """RSD-S end to end: two tokens of text are distributed as the verifier's, whatever the beam kept."""
    rng = np.random.default_rng(5)
    target = {s: row[::-1].copy() for s, row in NEXT.items()}
    rule, text = Recursive(), Counter[tuple[int, ...]]()
    for _ in range(8000):
        nodes = stochastic_beam_search(lambda s: NEXT[s], 3, 2, rng)
        tokens: tuple[int, ...] = ()
        while len(tokens) < 2:
            children = [node.tokens[-1] for node in nodes if node.tokens[:-1] == tokens]
            if children:
                tokens = (*tokens, rule.verify(target[tokens], NEXT[tokens], children, rng).token)
            else:
                tokens = (*tokens, int(rng.choice(3, p=target[tokens])))
        text[tokens] += 1
    law = {(a, b): float(target[()][a] * target[(a,)][b]) for a, b in product(range(3), repeat=2)}
    assert fits(text, {key: weight for key, weight in law.items() if weight > 0})


def test_a_conditional_that_is_no_distribution_is_named() -> None:
    with pytest.raises(CalibrationError, match="stochastic_beam_search: conditional: q must sum to 1"):
        stochastic_beam_search(lambda _: [0.5, 0.4], 2, 1, np.random.default_rng(0))
