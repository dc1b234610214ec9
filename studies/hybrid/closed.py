"""Closed batches in exact form: B copies of one request that decode in step, at linear prices.

SpecDecode-Bench (arXiv 2601.11580) serves every request as a batch of equal copies, one batch after the other,
prefill included; a policy's speed-up is the ratio of the means over requests of tokens per second. As copies go in
step, the rounds of a fixed rule are the same at every B, and a round's seconds follow from position, drafter and
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.traces import TraceSet
from calibration.traces.manifest import CostConstants, FractionOfVerify
from simulator.playback.replay import UNLIMITED, select_sequences
from simulator.playback.signals import DrafterRecording


@dataclass(frozen=True)
class Rounds:
    """The rounds that a rule plays, one after the other: request, cached tokens, who drafts (-1 none), how deep."""

    owner: Ints
    context: Ints
    drafter: Ints
    drafted: Ints


class ClosedBatches:
    """Recorded run lengths of some drafters on the requests of a TraceSet, bonus excluded, and exact replay of rules.

    `runs`, `proposed`: shape (drafters, positions), positions of all requests in a row; a proposal holds at most so
    many tokens. Position 0 of a request is emitted by its prefill.
    """

    def __init__(self, traces: TraceSet, drafters: Sequence[str]) -> None:
        self.sequences = select_sequences(traces, drafter=drafters)
        materials = [DrafterRecording(traces, name, self.sequences) for name in drafters]
        first = materials[0]
        self.drafters, self.starts, self.lengths, self.owners = drafters, first.starts, first.lengths, first.owners
        self.prompt = np.array(self.sequences.prompt_tokens, dtype=np.int64)
        self.end = (self.starts + self.lengths)[self.owners]
        position = np.arange(len(self.owners)) - self.starts[self.owners]
        self.context: Ints = self.prompt[self.owners] + position
        left = self.lengths[self.owners] - position
        columns = [material.columns("run_length", "proposal_length") for material in materials]
        self.runs: Ints = np.stack([np.minimum(np.nan_to_num(run).astype(np.int64), left) for run, _ in columns])
        limits = [np.where(np.isnan(limit), UNLIMITED, limit).astype(np.int64) for _, limit in columns]
        self.proposed: Ints = np.stack(limits)

    def play(self, drafter: Ints | int, tokens: Ints | int) -> Rounds:
        """Give the rounds of a rule that drafts `tokens` by `drafter` (-1: none) at each position."""
        places = np.arange(len(self.owners))
        who = np.broadcast_to(np.asarray(drafter), places.shape)
        asked = np.broadcast_to(np.asarray(tokens), places.shape)
        drafted = np.where(who >= 0, np.minimum(asked, self.proposed[who, places]), 0)
        following = np.minimum(places + np.minimum(self.runs[who, places], drafted) + 1, self.end).tolist()
        visited: list[int] = []
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            at, end = start + 1, start + length
            while at < end:
                visited.append(at)
                at = following[at]
        place = np.array(visited, dtype=np.int64)
        return Rounds(self.owners[place], self.context[place], who[place], drafted[place])

    def oracle(self, prices: CostConstants, batch: int) -> Rounds:
        """Give the rounds of the oracle: at each position the drafter that is faster there at its exact length."""
        places = np.arange(len(self.owners))
        rate = [
            (run + 1) / round_seconds(prices, batch, self.context, np.full(len(places), d), run, self.drafters)
            for d, run in enumerate(self.runs)
        ]
        best = np.argmax(np.stack(rate), axis=0)
        return self.play(best, self.runs[best, places])

    def seconds(self, rounds: Rounds, prices: CostConstants, batch: int) -> Floats:
        """Give the seconds of each request as a batch of `batch` copies, its prefill included; shape (requests,)."""
        each = round_seconds(prices, batch, rounds.context, rounds.drafter, rounds.drafted, self.drafters)
        verify = prices.verifier
        prefill = verify.base_s + verify.per_token_s * batch * self.prompt + prices.overhead_s
        decode = np.bincount(rounds.owner, weights=each, minlength=len(self.lengths))
        return np.asarray(prefill + decode, dtype=np.float64)

    def rates(self, rounds: Rounds, prices: CostConstants, batch: int) -> Floats:
        """Give tokens per second of each request, of one copy."""
        return np.asarray(self.lengths / self.seconds(rounds, prices, batch), dtype=np.float64)


def round_seconds(
    prices: CostConstants, batch: int, context: Ints, drafter: Ints, drafted: Ints, names: Sequence[str]
) -> Floats:
    """Give the seconds of rounds of `batch` copies: drafting, verification and overhead.

    A drafter asked for nothing, or whose proposal is empty, is paid where it was chosen (-1: none was).
    """
    verify = prices.verifier
    verify_s = verify.base_s + batch * (verify.per_token_s * (1 + drafted) + verify.per_context_token_s * context)
    draft_s = np.zeros(len(context))
    for number, name in enumerate(names):
        cost, mine = prices.drafters[name], drafter == number
        if isinstance(cost, FractionOfVerify):
            own = cost.fraction * verify_s
        elif cost.charged == "per_round":
            cached = cost.per_context_token_s * context
            own = cost.base_s + batch * (cost.per_token_s * drafted + cached)
        else:
            cached = cost.per_context_token_s * (context * drafted + drafted * (drafted - 1) / 2)
            own = (cost.base_s + batch * cost.per_token_s) * drafted + batch * cached
        draft_s = np.where(mine, own, draft_s)
    return np.asarray(draft_s + verify_s + prices.overhead_s, dtype=np.float64)


def as_one(prices: CostConstants, batch: int) -> CostConstants:
    """Give the prices at which one request alone takes what a batch of `batch` copies takes at `prices`: exact."""

    def scaled(cost: object) -> object:
        if isinstance(cost, FractionOfVerify):
            return cost
        assert hasattr(cost, "model_copy")
        update = {name: getattr(cost, name) * batch for name in ("per_token_s", "per_context_token_s")}
        return cost.model_copy(update=update)

    drafters = {name: scaled(cost) for name, cost in prices.drafters.items()}
    return prices.model_copy(update={"verifier": scaled(prices.verifier), "drafters": drafters})
