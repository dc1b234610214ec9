"""Drafter and draft length of every slot by forecast; see `Forecast` of the scenario."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.drafter_routing.forecast_learn import Forecasts, columns
from simulator.drafter_routing.group import Drafters
from simulator.playback.predictor import logistic
from simulator.playback.survival import RECENT_DECAY, recent_acceptance
from simulator.pricing.costs import DraftCost
from simulator.rounds.forecast import draft_seconds, even_seconds, verify_seconds
from simulator.rounds.round import Round


class ForecastRule:
    """Most expected tokens per second.

    With S_dj the forecast survival of drafter d at slot i, the slot's rate at (d, k) is (1 + sum over j <= k of S_dj)
    over the seconds of a round in which every slot drafts so: what k costs it, with its share of what is paid by the
    round. Since each token of a text is emitted once, the price of time is the slot's own: a token is worth the
    seconds that the best rate gives it. Where slots disagree on the drafter, the round is priced as it would be, with
    all drafters and without each that has a fixed price; the assignment with the largest value less seconds wins.
    """

    def __init__(
        self, forecasts: Forecasts, drafters: Drafters, costs: Sequence[DraftCost], learns: Sequence[bool], slots: int
    ) -> None:
        self._forecasts, self._drafters, self._costs = forecasts, drafters, costs
        self._learns = np.array(learns)
        self._accepted, self._compared = np.zeros((len(costs), slots)), np.zeros((len(costs), slots))
        self._longest = forecasts.coefficients.shape[2]

    def opened(self, slots: Ints) -> None:
        """Forget the recent acceptance of these."""
        self._accepted[:, slots] = self._compared[:, slots] = 0.0

    def learn(self, round_: Round, row: Ints, drafted: Ints, accepted: Ints) -> None:
        """Add the round to the recent acceptance of the drafters that drafted."""
        drew = drafted > 0
        row, slots = row[drew], round_.slots[drew]
        self._accepted[row, slots] = RECENT_DECAY * self._accepted[row, slots] + accepted[drew]
        met = np.minimum(accepted + 1, drafted)[drew]
        self._compared[row, slots] = RECENT_DECAY * self._compared[row, slots] + met

    def survival(self, round_: Round, drafter: int) -> Floats:
        """Give S_1 .. S_longest of each slot: the forecast, 0 beyond what the drafter proposes."""
        many = self._drafters.many
        place = many.positions(round_.cursor)
        recent = np.zeros(len(place))
        if self._learns[drafter]:
            recent = recent_acceptance(self._accepted[drafter, round_.slots], self._compared[drafter, round_.slots])
        x = columns(self._forecasts.facts.values[place], recent)
        known, model = self._forecasts, self._forecasts.model[place]
        path, each = known.facts.path(place, self._longest), model[:, None]
        effect = known.own[drafter, each, path[:, 1:]] + known.before[drafter, each, path[:, :-1]]
        hazard = logistic(np.einsum("ik,ijk->ij", x, known.coefficients[drafter][model]) + effect)
        if many.proposal_length is not None:
            limit = many.proposal_length[many.at(round_.cursor, drafter)]
            hazard = np.where(np.arange(self._longest) < limit[:, None], hazard, 0.0)
        return np.asarray(np.cumprod(hazard, axis=1))

    def choose(self, round_: Round, cap: Ints) -> tuple[Ints, Ints]:
        """Give (drafter, draft length)."""
        rates, tokens, lengths = self._best(round_, cap)
        row = np.argmax(rates, axis=0)
        slot = np.arange(round_.active)
        if round_.active == 1 or int(row.min()) == int(row.max()):
            return row, lengths[row, slot]
        worth = 1 / rates[row, slot]
        best, most = row, self._value(round_, row, tokens, lengths, worth)
        for left_out in range(len(self._costs)):
            others = rates.copy()
            others[left_out] = 0.0
            other = np.argmax(others, axis=0)
            value = self._value(round_, other, tokens, lengths, worth)
            if value > most:
                best, most = other, value
        return best, lengths[best, slot]

    def _best(self, round_: Round, cap: Ints) -> tuple[Floats, Floats, Ints]:
        """Give (rate, expected tokens with the bonus, length) of each drafter's best length: (drafters, slots)."""
        longest = min(self._longest, int(cap.max()))
        beyond = np.arange(longest + 1) > cap[:, None]
        found = []
        for drafter in range(len(self._costs)):
            survival = self.survival(round_, drafter)[:, :longest]
            expected = np.cumsum(np.concatenate([np.ones((round_.active, 1)), survival], axis=1), axis=1)
            view = _at(round_, self._drafters, drafter)
            seconds = even_seconds(view, longest) / round_.active
            rate = np.where(beyond, 0.0, expected / seconds)
            length = np.argmax(rate, axis=1)
            slot = np.arange(round_.active)
            found.append((rate[slot, length], expected[slot, length], length))
        rates, tokens, lengths = (np.stack(part) for part in zip(*found, strict=True))
        return rates, tokens, lengths

    def _value(self, round_: Round, row: Ints, tokens: Floats, lengths: Ints, worth: Floats) -> float:
        """Give what the expected tokens are worth in seconds, less what the round would take."""
        slot = np.arange(round_.active)
        length = lengths[row, slot]
        verify_s = float(verify_seconds(round_, np.array([int(length.sum())]))[0])
        seconds = verify_s
        for drafter in range(len(self._costs)):
            mine = (row == drafter) & (length > 0)
            if mine.any():
                prices = self._drafters.prices(round_.prices, drafter)
                own = length[mine]
                share = np.full(int(own.max()) + 1, verify_s - round_.prices.overhead_s)
                seconds += float(draft_seconds(prices, round_.context[mine], own, share)[-1])
        return float(tokens[row, slot] @ worth) - seconds


def _at(round_: Round, drafters: Drafters, drafter: int) -> Round:
    """Give the round with the prices of `drafter`."""
    return replace(round_, prices=drafters.prices(round_.prices, drafter))
