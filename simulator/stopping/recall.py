"""What a request's own past tells of a draft: acceptance of late, and how drafts fared where its text was the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.errors import ReplayError
from simulator.arrays import FloatArray, IntArray
from simulator.playback.recorded import Material
from simulator.routing.text_facts import text_facts

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

    An engine knows `accepted` behind its last token: of what it compared from verification; of a bonus token from the
    drafter's next pass, which must take in the last drafted token anyway. Sampled decoding: the probability, from both
    distributions. Where a request goes on with another's recording, that one's past stands for its own: an estimate.
    """

    start: FloatArray
    lately: FloatArray
    source: IntArray
    match: FloatArray
    accepted: FloatArray
    confidence: FloatArray

    def echo(self, places: IntArray, steps: int) -> tuple[FloatArray, FloatArray]:
        """Give acceptance (less the typical) and logit of confidence at the source's steps 1 .. `steps`, 0 without one.

        A source whose text ends here goes on with its own beginning. Shape (places, steps) each.
        """
        source = self.source[places, None]
        period = np.maximum(places[:, None] - source, 1)
        there = np.maximum(source, 0) + np.arange(steps) % period
        there = np.where(source >= 0, there, 0)
        known = source >= 0
        return np.where(known, self.accepted[there] - _TYPICAL, 0.0), np.where(known, logit(self.confidence[there]), 0.0)

    def before(self, places: IntArray, steps: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Give what is known before step j + 1 for j = 0 .. `steps` - 1, and acceptance and confidence of `echo`.

        Shape (places, steps, columns): `start`; the source's acceptance at step j + 1, its product with the match
        length, the one behind; the source's survival to j and to j + 1.
        """
        there, sure = self.echo(places, steps + 1)
        known = (self.source[places] >= 0)[:, None]
        survival = np.cumprod(np.where(known, there + _TYPICAL, 0.0), axis=1)
        reached = np.concatenate([known.astype(np.float64), survival], axis=1)[:, :steps]
        match = self.match[places, None]
        own = np.stack(
            [there[:, :steps], there[:, :steps] * match, there[:, 1:], reached, survival[:, :steps]], axis=-1
        )
        start = np.broadcast_to(self.start[places, None, :], (len(places), steps, self.start.shape[1]))
        return np.concatenate([start, own], axis=-1), there, sure


def logit(p: FloatArray) -> FloatArray:
    """Give log(p / (1 - p)), of p kept 1e-4 from 0 and 1."""
    p = np.clip(p, _EDGE, 1 - _EDGE)
    return np.asarray(np.log(p / (1 - p)), dtype=np.float64)


def make_recall(material: Material, confidence: FloatArray) -> Recall:
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


def _past(material: Material, accepted: FloatArray, confidence: FloatArray) -> FloatArray:
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


def _sources(material: Material) -> tuple[IntArray, FloatArray]:
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
