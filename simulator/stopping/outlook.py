"""Forecasts of how far a draft survives, from what was drafted so far and what the request's own past tells."""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from simulator.playback.predictor import FOLDS, logistic
from simulator.playback.recorded import Material
from simulator.playback.replay import SequenceTable
from simulator.playback.signals import Places, RecordedSignals
from simulator.playback.survival import fit_ridge
from simulator.stopping.recall import Recall, logit, make_recall

_DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 40, 56)
"""Steps seen, of the rows that a fit looks at."""
_ROWS = 150_000
"""Rows that a fit looks at, at most, evenly over the places."""


class OutlookSignals(RecordedSignals):
    """Signals with the forecasts that `Learned` reads, fitted to the sequences of other folds.

    Two logistic models of P(more than j accepted | steps 1 .. j seen): one of j = 0, one of all j from 1 on. Labels
    are run lengths (sampled decoding: drawn once from the recorded acceptance probabilities, for the fit alone).
    """

    def __init__(self, replay: Places, material: Material, confidence: Floats, entropy: Floats) -> None:
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


def fit_outlook(material: Material, confidence: Floats, entropy: Floats, recall: Recall) -> tuple[Floats, Floats]:
    """Give the coefficients before a draft and within it, one row a fold, each fitted to the other folds."""
    if min(FOLDS, len(material.sequences)) < 2:
        raise ReplayError(
            "stopping.policy: 'learned' must have at least 2 sequences: each is predicted by a fit to the others"
        )
    runs = drawn_runs(material)
    found = [_fit(material, (confidence, entropy), recall, runs, part) for part in range(FOLDS)]
    return np.array([first for first, _ in found]), np.array([following for _, following in found])


def _fit(
    material: Material, felt: tuple[Floats, Floats], recall: Recall, runs: Ints, part: int
) -> tuple[Floats, Floats]:
    """Give the coefficients for fold `part`; tails too are borrowed from the sequences of other folds."""
    places = np.flatnonzero(material.owners % FOLDS != part)
    others = Material(material.traces, material.drafter, _without(material.sequences, part))
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


def drawn_runs(material: Material) -> Ints:
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


def make_outlook(replay: Places, material: Material) -> OutlookSignals:
    """Compile the signals and fit the forecasts.

    Raises `ReplayError` where confidences, entropies or rollouts are missing.
    """
    names = ("drafter_confidence", "drafter_entropy")
    confidence, entropy = material.columns(*names)
    for name, values in zip(names, (confidence, entropy), strict=True):
        material.whole(name, values, "stopping.policy 'learned'")
    return OutlookSignals(replay, material, confidence, entropy)
