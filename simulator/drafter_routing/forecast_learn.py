"""Learning forecasts of drafts from recorded requests, without the ones that they are for; see `Forecast`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from calibration.traces import TraceSet
from simulator.drafter_routing.prompts import equal_rows, token_counts
from simulator.playback.recorded import Material
from simulator.playback.replay import UNLIMITED, SequenceTable, select_sequences
from simulator.playback.survival import RECENT_DECAY, Hazard, fit_effects, fit_hazard, recent_acceptance
from simulator.playback.text_facts import TextFacts, text_facts
from simulator.workload.streams import stream

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
    found = _learn(traces, drafters, served, longest, folds, learn_from, seed)
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
    materials = [Material(traces, name, taught) for name in drafters]
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


def shadow_acceptance(material: Material, runs: Ints, copies: Ints) -> Floats:
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


def _copies(materials: Sequence[Material], match: Ints) -> Ints:
    """Give the accepted tokens of a copy where three tokens or more match; -1 elsewhere, and where none copies."""
    best = np.full(len(match), -1)
    for material in materials:
        if material.info.deterministic:
            best = np.maximum(best, np.minimum(_runs(material)[0], _SHADOW_COPY))
    return np.where(match >= _SHADOW_MATCH, best, -1)


def _runs(material: Material) -> tuple[Ints, Ints]:
    """Give (run lengths, proposal lengths) at every flat place; `ReplayError` where run lengths are missing."""
    runs, proposed = material.columns("run_length", "proposal_length")
    material.whole("run_length", runs, _NEEDED_BY)
    limits = np.where(np.isnan(proposed), UNLIMITED, proposed).astype(np.int64)
    return np.nan_to_num(runs).astype(np.int64), limits
