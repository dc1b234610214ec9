"""Drift of the traffic: who recovers, and what online adjustment of draft lengths is worth."""

from __future__ import annotations

import numpy as np
import pytest
from request_tables import PRICES, table_of
from several import several

from analysis.routing.classifier import Guesses
from analysis.routing.compare import over_orders
from analysis.routing.drift import UNSEEN, drift, online, widest_phases

TABLE = table_of({"chat": (3.0, 1.0), "code": (1.0, 2.0)}, 20)


def test_phases_are_the_domains_between_which_drafters_differ_most() -> None:
    four = table_of({"p": (1.0, 2.0), "q": (1.0, 1.1), "r": (2.0, 1.9), "s": (3.0, 1.0)}, 5)
    # b is best alone (6 s against 7 s); it gains most on s, least on p.
    assert widest_phases(four) == (("s", "r"), ("q", "p"))


def test_the_window_recovers_and_plain_ucb_later() -> None:
    guesses = None
    found = drift(TABLE, guesses, None, None, (("code",), ("chat",)), requests=300, window=40, orders=10, seed=0)
    plain, windowed, fixed = "ucb c=0.1", "ucb c=0.1, last 40", "always a"
    assert found.before[fixed].value == 1.0  # tuned on the first phase
    assert found.settled[fixed].value == pytest.approx(1 / 3)
    assert found.before[plain].value > 0.97
    assert found.settled[windowed].value > 0.9
    curve = {(point.policy, point.until): point.efficiency.value for point in found.curve}
    # The window holds nothing of the first phase after 40 requests; plain UCB still believes in it after 100.
    assert curve[windowed, 400] > 0.9
    assert curve[plain, 400] < 0.6
    assert len(found.curve) == 24 * 6  # 600 requests in bins of 25, six policies
    assert found.before[fixed].orders == 10


def test_a_classifier_of_the_first_phase_alone_does_not_know_the_second() -> None:
    from scipy.sparse import csr_matrix

    labels = (np.array(TABLE.domains) == "code").astype(np.int64)
    words = np.zeros((40, 4))
    words[labels == 0, :2] = 1.0
    words[labels == 1, 2:] = 1.0
    words += np.random.default_rng(0).integers(0, 2, words.shape)
    belief = np.eye(2)[labels]
    guesses = Guesses(("chat", "code"), labels, belief, belief, np.arange(40) % 4, (1.0,) * 4)
    counts = csr_matrix(words)
    found = drift(
        TABLE,
        guesses,
        counts,
        np.arange(40),
        (("code",), ("chat",)),
        requests=50,
        window=10,
        orders=3,
        seed=0,
    )
    assert found.before[UNSEEN].value == found.after["calibrated classifier"].value == 1.0
    assert found.after[UNSEEN].value == pytest.approx(1 / 3)  # it only ever heard of code


def test_online_lengths_follow_a_change_that_a_tuned_length_does_not() -> None:
    """Drafts are always right in the first half and never in the later: long drafts, then none, are best."""
    good, bad = [59 - t for t in range(60)], [0] * 60
    traces = several({"a": [good, bad] * 12}, domains=("easy", "hard"))
    found = online(traces, "a", PRICES, (("easy",), ("hard",)), (2, 8), 0, batch=2, draws=200)
    assert (found.tuned_tokens, found.best_later_tokens) == (8, 0)
    rows = {row.policy: row for row in found.rows}
    assert (rows["goodput"].later_ratio.low or 0) > 1.1
    assert rows["goodput"].tuned_ratio.value == pytest.approx(1.0, abs=0.1)
    hindsight = rows["fixed 0, best in hindsight"]
    assert (hindsight.later_ratio.value or 0) >= (rows["goodput"].later_ratio.value or 0) * 0.99
    assert (hindsight.tuned_ratio.value or 9) < 0.6


def test_means_over_orders() -> None:
    mean = over_orders(np.array([1.0, 2.0, 3.0]))
    # t(2, 97.5%) = 4.3027, standard error 1 / sqrt(3).
    assert (mean.value, mean.orders) == (2.0, 3)
    assert mean.high - mean.value == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
