"""Drafter and draft length of every slot by forecast; see `Forecast` of the scenario.

Learning forecasts of drafts from recorded requests, without the ones that they are for; see `Forecast`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from calibration.traces import TraceSet
from simulator.drafter_routing.group import Drafters
from simulator.drafter_routing.prompts import equal_rows, token_counts
from simulator.playback.replay import UNLIMITED, SequenceTable, select_sequences
from simulator.playback.signals import DrafterRecording, logistic
from simulator.playback.survival import (
    RECENT_DECAY,
    Hazard,
    TextFacts,
    fit_effects,
    fit_hazard,
    recent_acceptance,
    text_facts,
)
from simulator.pricing.costs import DraftCost
from simulator.rounds.protocols import Round, draft_seconds, even_seconds, verify_seconds
from simulator.workload.lengths import stream

_SHADOW_DRAFT = 7
"""Draft length of the rounds that give the recent acceptance which a fit sees."""
_SHADOW_MATCH, _SHADOW_COPY = 3, 20
"""The plain rule in whose rounds that is: matched tokens from which on is copied, and how many are."""
_NEEDED_BY = "routing.drafter policy 'forecast'"


@dataclass(frozen=True)
class Forecasts:
    """What is known beforehand: facts of the positions served, and hazards to turn them into survival curves.

    `coefficients` (drafters, models, longest, columns): at_depth of the hazard of each model; `model` (positions):
    the one learned without the request of that position. Columns: constant, `FACTS`, recent acceptance.
    `own`, `before` (drafters, models, tokens + 1): the effects of tokens, see `simulator.playback.survival`.
    """

    facts: TextFacts
    coefficients: Floats
    own: NDArray[np.float32]
    before: NDArray[np.float32]
    model: Ints


def learn_forecasts(
    traces: TraceSet,
    drafters: Sequence[str],
    served: SequenceTable,
    *,
    longest: int,
    folds: int,
    learn_from: Sequence[str] | None,
    seed: int,
) -> Forecasts:
    """Learn from `served`, or from the domains `learn_from`; `longest` draft, bonus excluded.

    Deterministic: the same TraceSet, settings and seed give the same numbers. NOTE: the last one is kept, since
    scenarios that are compared differ in prices and batch sizes but not in this, and learning takes seconds.
    """
    key = (tuple(drafters), served.ids, longest, folds, None if learn_from is None else tuple(learn_from), seed)
    if _LAST and _LAST[0][0]() is traces and _LAST[0][1] == key:
        return _LAST[0][2]
    found = _learn(
        traces=traces,
        drafters=drafters,
        served=served,
        longest=longest,
        folds=folds,
        learn_from=learn_from,
        seed=seed,
    )
    _LAST[:] = [(weakref.ref(traces), key, found)]
    return found


_LAST: list[tuple[weakref.ref[TraceSet], tuple[object, ...], Forecasts]] = []


def _learn(
    traces: TraceSet,
    drafters: Sequence[str],
    served: SequenceTable,
    longest: int,
    folds: int,
    learn_from: Sequence[str] | None,
    seed: int,
) -> Forecasts:
    facts = text_facts(traces, served, _NEEDED_BY)
    taught, taught_facts = served, facts
    if learn_from is not None:
        taught = select_sequences(traces, domains=learn_from, drafter=drafters)
        taught_facts = text_facts(traces, taught, _NEEDED_BY)
    fold, number = deal(traces, taught, folds, seed)
    models = range(number + (learn_from is not None))
    materials = [DrafterRecording(traces, name, taught) for name in drafters]
    owners, needed = materials[0].owners, materials[0].needed
    at_fold = fold[owners[needed]]
    copies = _copies(materials, taught_facts.match)
    tokens = int(max(facts.text.max(), taught_facts.text.max())) + 1
    path = taught_facts.path(needed, longest)
    coefficients, effects = [], []
    for material in materials:
        runs, proposed = _runs(material)
        x = columns(taught_facts.values, shadow_acceptance(material, runs, copies))[needed]
        runs, proposed = runs[needed], proposed[needed]
        hazards: list[Hazard] = []
        for part in models:
            other = at_fold != part
            hazards.append(fit_hazard(x[other], runs[other], proposed[other], longest))
            effect = fit_effects(hazards[-1], x[other], path[other], runs[other], proposed[other], tokens)
            effects.append(np.stack([effect.own, effect.before]).astype(np.float32))
        coefficients.append(np.stack([hazard.at_depth for hazard in hazards]))
    by_id = dict(zip(taught.ids, fold.tolist(), strict=True))
    model = [by_id.get(name, number) for name in served.ids]
    shape = (len(drafters), len(models), 2, tokens + 1)
    own, before = np.moveaxis(np.stack(effects).reshape(shape), 2, 0)
    return Forecasts(facts, np.stack(coefficients), own, before, np.repeat(np.array(model), served.output_tokens))


def columns(facts: Floats, recent: Floats) -> Floats:
    """Give rows of (1, facts, recent acceptance)."""
    return np.concatenate([np.ones((len(facts), 1)), facts, recent[:, None]], axis=1)


def deal(traces: TraceSet, sequences: SequenceTable, folds: int, seed: int) -> tuple[Ints, int]:
    """Give (fold of each sequence, number of folds), at random by `seed`; equal prompts share a fold.

    Raises `ReplayError` where all prompts are equal.
    """
    kinds = equal_rows(token_counts(traces, sequences, _NEEDED_BY))
    number = min(folds, int(kinds.max()) + 1)
    if number < 2:
        raise ReplayError("routing.drafter.policy: 'forecast' must have at least 2 different prompts to learn from")
    order = stream(seed, "folds").permutation(int(kinds.max()) + 1)
    return (np.argsort(order) % number)[kinds], number


def shadow_acceptance(material: DrafterRecording, runs: Ints, copies: Ints) -> Floats:
    """Give what recent acceptance would be at every position in rounds like those of the plain rule.

    Where a copy is made (`copies` >= 0: its accepted tokens), the round is the lookup's and teaches nothing of this
    drafter; elsewhere this one drafts. So a fit sees the rounds that will be asked of it: the hard ones. 0 for
    drafters that copy given tokens: how copies fared is among the facts, whoever drafted.
    """
    state = np.zeros((len(runs), 2))
    if material.info.deterministic:
        return np.zeros(len(runs))
    listed, copied = runs.tolist(), copies.tolist()
    for start, length in zip(material.starts.tolist(), material.lengths.tolist(), strict=True):
        at, end, accepted, compared = start + 1, start + length, 0.0, 0.0
        while at < end:
            if copied[at] >= 0:
                state[at : min(at + copied[at] + 1, end)] = accepted, compared
                at += copied[at] + 1
                continue
            run = min(listed[at], _SHADOW_DRAFT)
            state[at : min(at + run + 1, end)] = accepted, compared
            accepted = RECENT_DECAY * accepted + run
            compared = RECENT_DECAY * compared + min(run + 1, _SHADOW_DRAFT)
            at += run + 1
    return recent_acceptance(state[:, 0], state[:, 1])


def _copies(materials: Sequence[DrafterRecording], match: Ints) -> Ints:
    """Give the accepted tokens of a copy where three tokens or more match; -1 elsewhere, and where none copies."""
    best = np.full(len(match), -1)
    for material in materials:
        if material.info.deterministic:
            best = np.maximum(best, np.minimum(_runs(material)[0], _SHADOW_COPY))
    return np.where(match >= _SHADOW_MATCH, best, -1)


def _runs(material: DrafterRecording) -> tuple[Ints, Ints]:
    """Give (run lengths, proposal lengths) at every flat place; `ReplayError` where run lengths are missing."""
    runs, proposed = material.columns("run_length", "proposal_length")
    material.whole("run_length", runs, _NEEDED_BY)
    limits = np.where(np.isnan(proposed), UNLIMITED, proposed).astype(np.int64)
    return np.nan_to_num(runs).astype(np.int64), limits


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
