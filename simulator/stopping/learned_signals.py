"""What a request's own past tells of a draft: acceptance of late, and how drafts fared where its text was alike.

Forecasts of how far a draft survives, from what was drafted so far and what the request's own past tells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from simulator.playback.replay import SequenceTable
from simulator.playback.signals import FOLDS, DrafterRecording, Places, RecordedSignals, logistic
from simulator.playback.survival import fit_ridge, text_facts

_TYPICAL = 0.6
"""Acceptance of a request that nothing is known of."""
_LATELY, _LONG = 0.9, 0.97
"""Weight of the past in the moving averages of acceptance, a token."""
_FELT, _FELT_LATELY = 0.95, 0.8
"""The same for acceptance less confidence."""
_SHORTEST_MATCH = 2
_EDGE = 1e-4


@dataclass(frozen=True)
class Recall:
    """What is known of a request before a draft, by flat place; all of it from tokens committed before that place.

    `start` (places, columns): the constant; log odds of acceptance of late, in two moving averages; acceptance less
    confidence of late, in two; logs of 1 + the current and the last two runs of accepted tokens; logs of 1 + position
    and 1 + match length; whether there is a source. `lately` (places): the faster average. `source`: the place where
    the latest earlier match of the text's end goes on, in the output, -1 without one of two tokens. `accepted`,
    `confidence` (places): of the drafter on the text.

    An engine knows `accepted` behind its last token: of what it compared, from verification; of a bonus token, from
    the drafter's next pass, which takes in the last drafted token anyway; of what was decoded without a draft, once
    the drafter has filled its cache. Sampled decoding: the probability, from both distributions. Where a request goes
    on with another's recording, that one's past stands for its own: an estimate.
    """

    start: Floats
    lately: Floats
    source: Ints
    match: Floats
    accepted: Floats
    confidence: Floats

    def echo(self, places: Ints, steps: int) -> tuple[Floats, Floats]:
        """Give acceptance (less the typical) and logit of confidence at steps 1 .. `steps` from the source, else 0.

        A source whose text ends here goes on with its own beginning. Shape (places, steps) each.
        """
        there, known = _onward(self.source[places], places, steps)
        return np.where(known, self.accepted[there] - _TYPICAL, 0.0), np.where(
            known, logit(self.confidence[there]), 0.0
        )

    def before(self, places: Ints, steps: int) -> tuple[Floats, Floats, Floats]:
        """Give what is known before step j + 1 for j = 0 .. `steps` - 1, and acceptance and confidence of `echo`.

        Shape (places, steps, columns): `start`; the source's acceptance at step j + 1, its product with the match
        length, the one behind; the source's survival to j and to j + 1; acceptance at the source of the source, an
        earlier occurrence still, at steps j + 1 and j + 2, its product with the first, and whether there is one.
        """
        there, sure = self.echo(places, steps + 1)
        source = self.source[places]
        has = (source >= 0)[:, None]
        survival = np.cumprod(np.where(has, there + _TYPICAL, 0.0), axis=1)
        reached = np.concatenate([has.astype(np.float64), survival], axis=1)
        earlier, known = _onward(np.where(has[:, 0], self.source[np.maximum(source, 0)], -1), source, steps + 1)
        older = np.where(known, self.accepted[earlier] - _TYPICAL, 0.0)
        now = slice(0, steps)
        columns = [there[:, now], there[:, now] * self.match[places, None], there[:, 1:], reached[:, now]]
        columns += [survival[:, now], older[:, now], older[:, 1:], older[:, now] * there[:, now]]
        columns += [np.broadcast_to(known, (len(places), steps)).astype(np.float64)]
        start = np.broadcast_to(self.start[places, None, :], (len(places), steps, self.start.shape[1]))
        return np.concatenate([start, np.stack(columns, axis=-1)], axis=-1), there, sure


def _onward(source: Ints, end: Ints, steps: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Give the places of steps 1 .. `steps` from `source`, which lie before `end`, and whether there is a source."""
    known = (source >= 0)[:, None]
    period = np.maximum(end - source, 1)[:, None]
    return np.where(known, source[:, None] + np.arange(steps) % period, 0), known


def logit(p: Floats) -> Floats:
    """Give log(p / (1 - p)), of p kept 1e-4 from 0 and 1."""
    p = np.clip(p, _EDGE, 1 - _EDGE)
    return np.asarray(np.log(p / (1 - p)), dtype=np.float64)


def make_recall(material: DrafterRecording, confidence: Floats) -> Recall:
    """Read the past of every place. Without recorded token ids no place has a source."""
    (accepted,) = material.columns("accept_probability")
    accepted = np.where(np.isfinite(accepted), accepted, _TYPICAL)
    confidence = np.where(np.isfinite(confidence), confidence, _TYPICAL)
    source, match = _sources(material)
    past = _past(material, accepted, confidence)
    position = np.arange(len(accepted)) - material.starts[material.owners]
    lately = np.clip(past[:, 0], 0.01, 0.99)
    columns = [np.ones(len(accepted)), logit(past[:, 0]), logit(past[:, 1]), past[:, 2], past[:, 3]]
    columns += [np.log1p(past[:, 4]), np.log1p(past[:, 5]), np.log1p(past[:, 6])]
    columns += [np.log1p(position), match, (source >= 0).astype(np.float64)]
    return Recall(np.stack(columns, axis=1), lately, source, match, accepted, confidence)


def _past(material: DrafterRecording, accepted: Floats, confidence: Floats) -> Floats:
    """Give moving averages and runs before every place: shape (places, 7)."""
    rows = []
    pairs = list(zip(accepted.tolist(), confidence.tolist(), strict=True))
    for start, length in zip(material.starts.tolist(), material.lengths.tolist(), strict=True):
        lately = long = _TYPICAL
        felt = felt_lately = run = last = last_but_one = 0.0
        for hit, sure in pairs[start : start + length]:
            rows.append((lately, long, felt, felt_lately, run, last, last_but_one))
            lately = _LATELY * lately + (1 - _LATELY) * hit
            long = _LONG * long + (1 - _LONG) * hit
            felt = _FELT * felt + (1 - _FELT) * (hit - sure)
            felt_lately = _FELT_LATELY * felt_lately + (1 - _FELT_LATELY) * (hit - sure)
            if hit > 0.5:
                run += 1
            else:
                run, last, last_but_one = 0.0, run, last
    return np.array(rows, dtype=np.float64)


def _sources(material: DrafterRecording) -> tuple[Ints, Floats]:
    """Give for every place where the text's latest earlier match goes on, and the log of 1 + the match length."""
    places = int(material.lengths.sum())
    try:
        facts = text_facts(material.traces, material.sequences, "matches")
    except ReplayError:  # recorded without token ids
        return np.full(places, -1, dtype=np.int64), np.zeros(places)
    place_of = np.full(len(facts.text), -1, dtype=np.int64)
    place_of[facts.end] = np.arange(places)
    found = np.where(facts.source >= 0, place_of[np.maximum(facts.source, 0)], -1)
    source = np.where(facts.match >= _SHORTEST_MATCH, found, -1)
    return source, np.where(source >= 0, np.log1p(np.minimum(facts.match, 24)), 0.0)


_DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 40, 56)
"""Steps seen, of the rows that a fit looks at."""
_ROWS = 150_000
"""Rows that a fit looks at, at most, evenly over the places."""


class OutlookSignals(RecordedSignals):
    """Signals with the forecasts that `Learned` reads, fitted to the sequences of other folds.

    Two logistic models of P(more than j accepted | steps 1 .. j seen): one of j = 0, one of all j from 1 on. Labels
    are run lengths (sampled decoding: drawn once from the recorded acceptance probabilities, for the fit alone).
    """

    def __init__(self, replay: Places, material: DrafterRecording, confidence: Floats, entropy: Floats) -> None:
        super().__init__(replay, material, confidence, entropy)
        self._recall = make_recall(material, confidence)
        self._first, self._next = fit_outlook(material, confidence, entropy, self._recall)

    def outlook(self, cursor: Ints, steps: int) -> tuple[Floats, Floats]:
        """Give P(at least j + 1 accepted | steps 1 .. j seen) for j = 0 .. `steps` - 1, and acceptance of late.

        Shapes (slots, `steps`) and (slots,). Column j reads steps 1 .. j alone.
        """
        counts = self.steps, self.estimated_steps
        confidence = self.confidence(cursor, steps)
        self.steps, self.estimated_steps = counts  # once for both
        places = self._replay.positions(cursor)
        before, after = outlook_columns(self._recall, places, confidence, self.entropy(cursor, steps))
        fold = self._owners[places] % FOLDS
        first = np.einsum("ik,ik->i", before, self._first[fold])
        following = np.einsum("ijk,ik->ij", after, self._next[fold])
        return logistic(np.concatenate([first[:, None], following], axis=1)), self._recall.lately[places]


def outlook_columns(recall: Recall, places: Ints, confidence: Floats, entropy: Floats) -> tuple[Floats, Floats]:
    """Give columns (places, c) before a draft, and (places, steps - 1, d) once steps 1 .. j were seen, j from 1 on.

    Seen: logit of the last token's confidence, its entropy, their squares and product, those of the token before; the
    log of the product of confidences, the least confidence, the largest entropy and their sum; log(1 + j); the
    source's acceptance at step j, by itself and by match length, and how far confidence is from what it was there.
    All of it but the constant once more, times log(1 + j) - 1.
    """
    steps = confidence.shape[1]
    before, there, sure_there = recall.before(places, steps)
    sure, entropy = logit(confidence[:, :-1]), entropy[:, :-1]
    product = np.cumsum(np.log(np.maximum(confidence[:, :-1], 1e-4)), axis=1)
    back = np.maximum(np.arange(steps - 1) - 1, 0)
    there, sure_there = there[:, : steps - 1], sure_there[:, : steps - 1]
    known = (recall.source[places] >= 0)[:, None]
    apart = np.where(known, np.minimum(np.abs(sure - sure_there), 3.0), 0.0)
    depth = np.broadcast_to(np.log1p(np.arange(1, steps)), sure.shape)
    seen = [sure, entropy, sure * entropy / 10, sure**2 / 10, entropy**2 / 10, sure[:, back], entropy[:, back]]
    seen += [product, np.minimum.accumulate(sure, axis=1), np.maximum.accumulate(entropy, axis=1)]
    seen += [np.cumsum(entropy, axis=1), depth, there, there * recall.match[places, None], apart, apart * there]
    after = np.concatenate([before[:, 1:], np.stack(seen, axis=-1)], axis=-1)
    return before[:, 0], np.concatenate([after, after[..., 1:] * (depth[..., None] - 1)], axis=-1)


def fit_outlook(
    material: DrafterRecording, confidence: Floats, entropy: Floats, recall: Recall
) -> tuple[Floats, Floats]:
    """Give the coefficients before a draft and within it, one row a fold, each fitted to the other folds."""
    if min(FOLDS, len(material.sequences)) < 2:
        raise ReplayError(
            "stopping.policy: 'learned' must have at least 2 sequences: each is predicted by a fit to the others"
        )
    runs = drawn_runs(material)
    found = [_fit(material, (confidence, entropy), recall, runs, part) for part in range(FOLDS)]
    return np.array([first for first, _ in found]), np.array([following for _, following in found])


def _fit(
    material: DrafterRecording, felt: tuple[Floats, Floats], recall: Recall, runs: Ints, part: int
) -> tuple[Floats, Floats]:
    """Give the coefficients for fold `part`; tails too are borrowed from the sequences of other folds."""
    places = np.flatnonzero(material.owners % FOLDS != part)
    others = DrafterRecording(material.traces, material.drafter, _without(material.sequences, part))
    confidence, entropy = (values[places] for values in felt)
    text = RecordedSignals(_OnText(runs[places]), others, confidence, entropy)
    chosen = others.needed[:: 1 + len(places) * len(_DEPTHS) // _ROWS]
    depth, steps = np.array(_DEPTHS), max(_DEPTHS) + 1
    columns = text.confidence(chosen, steps), text.entropy(chosen, steps)
    before, after = outlook_columns(recall, places[chosen], *columns)
    run = runs[places[chosen]]
    to_come = (others.starts + others.lengths)[others.owners[chosen]] - chosen
    inside = to_come[:, None] > depth
    following = fit_ridge(after[:, depth - 1][inside], (run[:, None] > depth)[inside])
    return fit_ridge(before, run > 0), following


def _without(sequences: SequenceTable, part: int) -> SequenceTable:
    """Give the sequences that are not in fold `part`."""
    kept = [row for row in range(len(sequences)) if row % FOLDS != part]
    ids, domains = sequences.ids, sequences.domains
    prompts, outputs = sequences.prompt_tokens, sequences.output_tokens
    return SequenceTable(
        tuple(ids[row] for row in kept),
        tuple(domains[row] for row in kept),
        tuple(prompts[row] for row in kept),
        tuple(outputs[row] for row in kept),
    )


class _OnText:
    """Places that are their own cursors."""

    def __init__(self, runs: Ints) -> None:
        self.run_length = runs

    def positions(self, cursors: Ints) -> Ints:
        """Give them back."""
        return cursors


def drawn_runs(material: DrafterRecording) -> Ints:
    """Give how many tokens of a draft at each place would be accepted: recorded, or drawn where text was sampled."""
    accepted, recorded = material.columns("accept_probability", "run_length")
    to_come = (material.starts + material.lengths)[material.owners] - np.arange(len(accepted))
    if material.greedy:
        return np.asarray(np.minimum(np.nan_to_num(recorded).astype(np.int64), to_come), dtype=np.int64)
    hit = np.random.default_rng(0).random(len(accepted)) < np.nan_to_num(accepted)
    runs = np.zeros(len(accepted) + 1, dtype=np.int64)
    for place in range(len(accepted) - 1, -1, -1):
        runs[place] = (1 + (runs[place + 1] if to_come[place] > 1 else 0)) if hit[place] else 0
    return runs[:-1]


def make_outlook(replay: Places, material: DrafterRecording) -> OutlookSignals:
    """Compile the signals and fit the forecasts.

    Raises `ReplayError` where confidences, entropies or rollouts are missing.
    """
    names = ("drafter_confidence", "drafter_entropy")
    confidence, entropy = material.columns(*names)
    for name, values in zip(names, (confidence, entropy), strict=True):
        material.whole(name, values, "stopping.policy 'learned'")
    return OutlookSignals(replay, material, confidence, entropy)
