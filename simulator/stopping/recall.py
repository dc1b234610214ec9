"""What a request's own past tells of a draft: acceptance of late, and how drafts fared where its text was alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from simulator.playback.recorded import Material
from simulator.playback.text_facts import text_facts

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


def make_recall(material: Material, confidence: Floats) -> Recall:
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


def _past(material: Material, accepted: Floats, confidence: Floats) -> Floats:
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


def _sources(material: Material) -> tuple[Ints, Floats]:
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
