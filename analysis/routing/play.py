"""Bandits at batch 1, played on the table of requests and drafters: the simulator's own policies, request by request.

At batch 1 a request ends before the next begins, and its time depends on its drafter alone, so this gives what the
simulator gives (a test says so), a thousand times faster: many orders can be played.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from analysis.common.bootstrap import number
from analysis.routing.findings import MeanOverOrders
from analysis.routing.served import RequestTable
from calibration.common.arrays import Floats, Ints
from simulator.drafter_routing.bandits import KernelUcb, ThompsonSampling, Ucb1, default_eta, kernel_matrix
from simulator.drafter_routing.choice import Choice, Newcomer
from simulator.drafter_routing.prompts import domain_contexts
from simulator.drafter_routing.window import SlidingUcb

Bandits = Mapping[str, Callable[[int], Choice]]
"""By name, what makes a bandit from a seed."""
KEEN = 0.1
"""Exploration that suits rewards which differ by a tenth, in the place of UCB1's sqrt(2) for rewards in [0, 1]."""


def bandits(table: RequestTable, window: int | None = None) -> Bandits:
    """Give the bandits of the simulator for the drafters of `table`; with `window` the one that forgets, too.

    PAK-UCB sees the domain label, not the tokens: on prompts that come again it would know each by heart.
    """
    arms = len(table.drafters)
    context_of, similarity = domain_contexts(table.domains)
    gram, eta = kernel_matrix(similarity, "poly"), default_eta(1000, arms, 0.05)
    found: dict[str, Callable[[int], Choice]] = {
        "ucb": lambda seed: Ucb1(arms, 2**0.5),
        f"ucb c={KEEN:g}": lambda seed: Ucb1(arms, KEEN),
        "thompson": lambda seed: ThompsonSampling(arms, seed),
        "pak_ucb": lambda seed: KernelUcb(arms, context_of, gram, 1.0, eta),
    }
    if window is not None:
        found[f"ucb c={KEEN:g}, last {window}"] = lambda seed: SlidingUcb(arms, KEEN, window)
    return found


def play(choice: Choice, table: RequestTable, order: Sequence[int]) -> Ints:
    """Give the drafter that `choice` takes for each request of `order`, one after the other at batch 1."""
    rates = table.rates.tolist()
    tokens = table.output_tokens.astype(int).tolist()
    arms = []
    for index, sequence in enumerate(order):
        arm = choice.choose(Newcomer(index, sequence, 0, tokens[sequence]))
        if tokens[sequence] > 1:  # what prefill ends has no round to learn from
            choice.learn(arm, sequence, rates[sequence][arm])
        arms.append(arm)
    return np.array(arms, dtype=np.int64)


def over_orders(samples: Floats) -> MeanOverOrders:
    """Give the mean of one number an order, two orders or more, with Student's t interval."""
    from scipy.stats import t

    orders = len(samples)
    mean = float(samples.mean())
    reach = float(t.ppf(0.975, orders - 1)) * float(samples.std(ddof=1)) / math.sqrt(orders)
    value, low, high = (number(x) or 0.0 for x in (mean, mean - reach, mean + reach))
    return MeanOverOrders(value, low, high, orders)
