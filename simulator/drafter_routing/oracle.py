"""Oracles: they know which drafted tokens will be accepted. No engine can do this; they bound what a router can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.drafter_routing.choice import Newcomer
from simulator.drafter_routing.replay import ManyRuns
from simulator.pricing.costs import DraftCost, DraftFraction, DraftPerStep, Prices


class Foresight:
    """What every round of a request would come to, for each drafter; the draft length is the policy's longest.

    `costs` None: a round costs 1, so that rounds are counted; else its seconds at batch 1.
    """

    def __init__(
        self, replay: ManyRuns, longest_draft: int | None, prices: Prices, costs: Sequence[DraftCost] | None
    ) -> None:
        self._replay, self._longest, self._prices, self._costs = replay, longest_draft, prices, costs

    def rounds(self, start: int, tokens: int, prompt_tokens: int) -> tuple[Ints, Floats]:
        """Give (where a round from each position ends, what it costs), shape (drafters, positions).

        `start`: of any row of the trajectory, `tokens` long.
        """
        ends, costs = [], []
        position = np.arange(tokens)
        for drafter in range(self._replay.joint):
            first = int(self._replay.at(start, drafter))
            runs = np.minimum(self._replay.run_length[first : first + tokens], tokens - position)
            drafted = runs if self._longest is None else np.full(tokens, self._longest)
            if self._replay.proposal_length is not None:
                drafted = np.minimum(drafted, self._replay.proposal_length[first : first + tokens])
            ends.append(np.minimum(position + np.minimum(runs, drafted) + 1, tokens))
            if self._costs is None:
                costs.append(np.ones(tokens))
            else:
                costs.append(alone_seconds(self._prices, self._costs[drafter], prompt_tokens + position, drafted))
        return np.stack(ends), np.stack(costs)

    def best_ways(self, start: int, tokens: int, prompt_tokens: int) -> list[int]:
        """Give for each position the drafter to draft there; see `best_ways`."""
        return best_ways(*self.rounds(start, tokens, prompt_tokens))


class BestAlone:
    """See `OracleRequest`: an oracle."""

    def __init__(self, foresight: Foresight, prompt_tokens: Sequence[int]) -> None:
        self._foresight, self._prompt_tokens = foresight, prompt_tokens

    def choose(self, newcomer: Newcomer) -> int:
        """Give the drafter that costs least to the end; of equals the first."""
        prompt = self._prompt_tokens[newcomer.sequence]
        ends, costs = self._foresight.rounds(newcomer.start, newcomer.tokens, prompt)
        return int(np.argmin([way_cost(*row) for row in zip(ends, costs, strict=True)]))

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Nothing to learn."""

    def describe(self) -> dict[str, Any]:
        """Say that it is an oracle."""
        return {"oracle": True}


def way_cost(ends: Ints, costs: Floats) -> float:
    """Give the cost of the rounds from position 1, the first after prefill, to the end."""
    after, each = ends.tolist(), costs.tolist()
    position, total = 1, 0.0
    while position < len(after):
        total += each[position]
        position = after[position]
    return total


def best_ways(ends: Ints, costs: Floats) -> list[int]:
    """Give for each position the drafter whose round there begins a way to the end that costs least.

    V(t) = min over g of cost_g(t) + V(end_g(t)), V = 0 at the end (Bellman); of equals the first.
    """
    tokens = ends.shape[1]
    after, each = ends.T.tolist(), costs.T.tolist()
    togo, best = [0.0] * (tokens + 1), [0] * tokens
    for position in range(tokens - 1, -1, -1):
        ways = [cost + togo[end] for cost, end in zip(each[position], after[position], strict=True)]
        togo[position] = least = min(ways)
        best[position] = ways.index(least)
    return best


def alone_seconds(prices: Prices, cost: DraftCost, context: Ints, drafted: Ints) -> Floats:
    """Give the seconds of rounds at batch 1, overhead included, in which one slot drafts `drafted` tokens."""
    tokens = 1 + drafted
    if prices.capture_sizes:
        sizes = np.array(prices.capture_sizes)
        place = np.searchsorted(sizes, tokens)
        tokens = np.where(place < len(sizes), sizes[np.minimum(place, len(sizes) - 1)], tokens)
    verify_s = np.asarray(prices.verify.step_seconds(1, tokens, context), dtype=np.float64)
    if isinstance(cost, DraftFraction):
        draft_s = np.asarray(cost.seconds(drafted, context, 1.0)[0] * verify_s)
    elif isinstance(cost, DraftPerStep):
        first, last = int(context.min()), int((context + drafted).max())
        steps = np.asarray(cost.step.step_seconds(1, 1, np.arange(first, last + 1)), dtype=np.float64)
        before = np.concatenate(([0.0], np.cumsum(np.broadcast_to(steps, last + 1 - first))))
        draft_s = before[context + drafted - first] - before[context - first]
    else:
        draft_s = np.asarray(cost.step.step_seconds(1, drafted if cost.tokens else 1, context), dtype=np.float64)
    return np.asarray(draft_s + verify_s + prices.overhead_s)
