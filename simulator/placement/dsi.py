"""The published model of distributed speculative inference (DSI), for one request.

Timor et al. 2024 (arXiv 2405.14105). Unit of cost: one verifier step. A drafter step costs c; each drafted token is
accepted independently with probability a; drafts have k tokens, shortened at the end of the output.

- SI (serial): every round costs its drafting and one verifier step, and gives the accepted tokens and one more.
- DSI, with enough target servers: drafting goes on while blocks are verified, until a token is rejected. Such a
  stretch of n accepted tokens and one correction costs min(drafting of all its blocks, the rejected one included,
  + 1, n + 1): what lies behind "+ 1" is the verification of the last block, and n + 1 is plain decoding.

`si_costs` and `dsi_costs` draw runs of this model, `expected_si_cost` and `expected_dsi_cost` give their exact
means. In the mean DSI never loses to SI or to plain decoding; on one and the same luck a stretch that ends exactly
with a block may, as the rejected block's drafting is charged. `simulator.placement.servers` does not charge that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CostError

_TAIL = 1e-17
"""Probability of the stretches that the asymptote leaves out."""


@dataclass(frozen=True)
class PublishedModel:
    """c, a, k and the number of output tokens; `CostError` where they are none."""

    draft_step: float
    acceptance: float
    draft_tokens: int
    output_tokens: int = 1000

    def __post_init__(self) -> None:
        """Refuse what the model does not know."""
        for name, holds, rule in (
            ("draft_step", self.draft_step > 0, "must be above 0"),
            ("acceptance", 0 <= self.acceptance <= 1, "must be in [0, 1]"),
            ("draft_tokens", self.draft_tokens >= 1, "must be at least 1"),
            ("output_tokens", self.output_tokens >= 1, "must be at least 1"),
        ):
            if not holds:
                raise CostError(f"{name}: {rule}, got {getattr(self, name)}")

    @property
    def servers(self) -> int:
        """Target servers that DSI needs: ceil(verifier step / drafting of a block)."""
        return servers_needed(1.0, self.draft_tokens * self.draft_step)


def servers_needed(verify_s: float, block_s: float) -> int:
    """Give how many target servers verify blocks as fast as they are drafted: ceil(verify_s / block_s)."""
    # NOTE: 1 / (10 * .1) is 1.0000000000000002 or so in other orders: less than 1e-9 too many is none.
    return max(1, math.ceil(verify_s / block_s - 1e-9))


def _accepted(model: PublishedModel, number: int, rng: Generator) -> Ints:
    """Draw how many tokens are accepted before the first rejection."""
    if model.acceptance == 1:
        return np.full(number, model.output_tokens)
    return rng.geometric(1 - model.acceptance, number) - 1


def si_costs(model: PublishedModel, runs: int, rng: Generator) -> Floats:
    """Draw the costs of `runs` outputs under serial speculation, in verifier steps."""
    cost, left = np.zeros(runs), np.full(runs, model.output_tokens)
    while left.any():
        drafted = np.minimum(model.draft_tokens, left - 1)
        accepted = np.minimum(_accepted(model, runs, rng), drafted)
        cost += np.where(left > 0, drafted * model.draft_step + 1, 0)
        left = np.maximum(left - accepted - 1, 0)
    return cost


def dsi_costs(model: PublishedModel, runs: int, rng: Generator) -> Floats:
    """Draw the costs of `runs` outputs under DSI with enough servers, in verifier steps."""
    cost, left = np.zeros(runs), np.full(runs, model.output_tokens)
    while left.any():
        accepted = np.maximum(np.minimum(_accepted(model, runs, rng), left - 1), 0)
        cost += np.where(left > 0, _stretch(model, accepted, left), 0)
        left = np.maximum(left - accepted - 1, 0)
    return cost


def _stretch(model: PublishedModel, accepted: Ints, left: Ints | int) -> Floats:
    """Give what a stretch of `accepted` tokens and one more costs DSI, where `left` tokens are to come."""
    drafted = np.minimum(model.draft_tokens * (accepted // model.draft_tokens + 1), np.asarray(left) - 1)
    return np.asarray(np.minimum(model.draft_step * drafted + 1, accepted + 1.0), dtype=np.float64)


def expected_si_cost(model: PublishedModel) -> float:
    """Give the exact mean: f(t) = min(k, t - 1) c + 1 + sum_i P(i accepted) f(t - i - 1), f(0) = 0."""
    cost = np.zeros(model.output_tokens + 1)
    for left in range(1, model.output_tokens + 1):
        drafted = min(model.draft_tokens, left - 1)
        cost[left] = drafted * model.draft_step + 1 + _stopped(model, drafted) @ _rest(cost, left, drafted)
    return float(cost[-1])


def expected_dsi_cost(model: PublishedModel) -> float:
    """Give the exact mean: g(t) = sum_n P(n accepted) (stretch of n + g(t - n - 1)), n <= t - 1, g(0) = 0."""
    cost = np.zeros(model.output_tokens + 1)
    for left in range(1, model.output_tokens + 1):
        stretch = _stretch(model, np.arange(left), left)
        cost[left] = _stopped(model, left - 1) @ (stretch + _rest(cost, left, left - 1))
    return float(cost[-1])


def _stopped(model: PublishedModel, drafted: int) -> Floats:
    """Give the probabilities that 0, 1, .. `drafted` of so many tokens are accepted."""
    chance = np.asarray(model.acceptance ** np.arange(drafted + 1) * (1 - model.acceptance), dtype=np.float64)
    chance[drafted] = model.acceptance**drafted
    return chance


def _rest(cost: Floats, left: int, drafted: int) -> NDArray[np.float64]:
    """Give the cost of what is left after 0, 1, .. `drafted` accepted tokens and one more."""
    return cost[left - 1 - np.arange(drafted + 1)]


def dsi_cost_per_token(model: PublishedModel) -> float:
    """Give the limit for long outputs: (1-a) sum_n (1-a) a^n min(1 + k c (floor(n/k) + 1), n + 1), a < 1.

    With k = 1 and c <= 1/2: (1-a) + c a + c a (1-a). With a = 1 drafting alone is left: min(c, 1).
    """
    a, k, c = model.acceptance, model.draft_tokens, model.draft_step
    if a == 1:
        return min(c, 1.0)
    length = 1 if a == 0 else math.ceil(math.log(_TAIL * (1 - a)) / math.log(a))
    n = np.arange(max(length, k + 1))
    stretch = np.minimum(1 + k * c * (n // k + 1), n + 1)
    return float((1 - a) * np.sum((1 - a) * a**n * stretch))
