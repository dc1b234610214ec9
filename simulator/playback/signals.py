"""Signals: what the drafter feels along its draft, from recorded positions and rollouts.

A draft from position t that agrees with the text for n tokens sees, at its steps 1 .. n + 1, the contexts of
positions t .. t + n: recorded, exact. At step n + 2 and later it stands behind its own first wrong token, where the
text says nothing. The steps behind a mismatch are its *tail*:

- A rollout recorded at t holds the tail itself. So does, for a drafter that sees tokens alone, a rollout from any
  other start whose draft goes wrong at the same token: both go on from the same context. Greedy decoding only; exact.
- Elsewhere the tail is borrowed from another rollout: of the sixteen whose drafter was most nearly as sure of its
  wrong token, one by a hash of the position. An estimate. (A mean over rollouts, smoother than any draft, would make
  every threshold rule stop always or never.)
- Beyond the last step recorded of a tail, its last value is repeated. An estimate.

In sampled decoding drafts are random: every tail is an estimate, borrowed from a rollout that left the text.

Columns of recorded positions as flat arrays, numbered as `simulator.playback.replay` numbers them.

Predicted acceptance of a drafted token, from how sure the drafter is of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ConvergenceWarning, ReplayError
from calibration.traces import DrafterInfo, TraceSet
from simulator.playback.replay import SequenceTable


@dataclass(frozen=True)
class DrafterRecording:
    """What was recorded of one drafter on the sequences served; what policies may be fitted to."""

    traces: TraceSet
    drafter: str
    sequences: SequenceTable

    @property
    def info(self) -> DrafterInfo:
        """The drafter in the manifest."""
        return self.traces.manifest.drafter(self.drafter)

    @property
    def greedy(self) -> bool:
        """Whether the verifier's text was decoded greedily."""
        return self.traces.manifest.decoding.mode == "greedy"

    @property
    def lengths(self) -> Ints:
        """Output tokens of each sequence."""
        return np.array(self.sequences.output_tokens, dtype=np.int64)

    @property
    def starts(self) -> Ints:
        """Where each sequence begins in the flat arrays."""
        return np.concatenate(([0], np.cumsum(self.lengths)[:-1]))

    @property
    def owners(self) -> Ints:
        """Which sequence each flat place belongs to."""
        return np.repeat(np.arange(len(self.sequences)), self.lengths)

    @property
    def needed(self) -> Ints:
        """Places where a draft can start: all but the first of a sequence, which prefill emits."""
        return np.setdiff1d(np.arange(int(self.lengths.sum())), self.starts)

    def rows(self, table: pa.Table, columns: Sequence[str]) -> tuple[pa.Table, Ints]:
        """Give this drafter's rows of `table` on these sequences, and each row's flat place."""
        mine = table.select(["sequence_id", "position", *columns]).filter(pc.equal(table["drafter"], self.drafter))
        code = pc.index_in(mine["sequence_id"], value_set=pa.array(self.sequences.ids))
        mine = mine.filter(pc.is_valid(code))
        owner = code.drop_null().to_numpy().astype(np.int64)
        return mine, self.starts[owner] + mine["position"].to_numpy()

    def columns(self, *names: str) -> list[Floats]:
        """Give columns of positions.parquet, NaN where missing."""
        table, place = self.rows(self.traces.positions, names)
        flat = []
        for name in names:
            values = np.full(int(self.lengths.sum()), np.nan)
            values[place] = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
            flat.append(values)
        return flat

    def whole(self, name: str, values: Floats, needed_by: str) -> None:
        """Refuse a column that lacks a value where a draft can start: `ReplayError` says where."""
        missing = self.needed[np.isnan(values[self.needed])]
        if len(missing):
            owner = int(np.searchsorted(self.starts, missing[0], side="right")) - 1
            raise ReplayError(
                f"positions.parquet: column '{name}': must be recorded for {needed_by}; missing for drafter "
                f"'{self.drafter}' at {len(missing)} positions, first sequence '{self.sequences.ids[owner]}', "
                f"position {int(missing[0] - self.starts[owner])}"
            )


FOLDS = 5
"""Sequences are dealt into so many groups; each is predicted by a fit to the other ones."""
_EDGE = 1e-6
"""Confidences are kept so far from 0 and 1, where the logit would be infinite."""
_RIDGE = 1e-4
"""Penalty on squared coefficients other than the constant, where the labels separate perfectly."""
_STEPS = 50


def features(confidence: Floats, entropy: Floats) -> Floats:
    """Give (1, logit of the confidence, entropy in nats) along a new last axis."""
    sure = np.clip(confidence, _EDGE, 1 - _EDGE)
    return np.stack([np.ones_like(sure), np.log(sure / (1 - sure)), entropy], axis=-1)


def logistic(x: Floats) -> Floats:
    """Give 1 / (1 + exp(-x))."""
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))), dtype=np.float64)


def fit_logistic(x: Floats, labels: Floats) -> Floats:
    """Fit coefficients b of P = logistic(x b) to labels in [0, 1] by iteratively reweighted least squares.

    Soft labels are probabilities, as SpecDec++ trains its head on min(1, p / q). The first column of `x` is the
    constant; the others carry a tiny ridge penalty. The mean prediction equals the mean label.
    """
    b = np.zeros(x.shape[1])
    ridge = np.diag([0.0] + [_RIDGE] * (x.shape[1] - 1))
    for _ in range(_STEPS):
        p = logistic(x @ b)
        gradient = x.T @ (labels - p) - ridge @ b
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge + 1e-9 * np.eye(len(b)), gradient)
        b += np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-8:
            return b
    warnings.warn(
        f"the logistic fit of acceptance did not converge in {_STEPS} steps", ConvergenceWarning, stacklevel=2
    )
    return b


def fit_by_fold(material: DrafterRecording, confidence: Floats, entropy: Floats) -> Floats:
    """Give coefficients for every sequence (sequences, 3), fitted to the positions of sequences of other folds.

    So that no request is predicted from its own text. Labels are the recorded acceptance probabilities (greedy:
    matched or not) at positions on the text; a drafter beyond its first wrong token was not seen in training.
    """
    (accepted,) = material.columns("accept_probability")
    owners = material.owners
    known = np.isfinite(accepted) & np.isfinite(confidence) & np.isfinite(entropy)
    x, labels, fold = features(confidence[known], entropy[known]), accepted[known], owners[known] % FOLDS
    coefficients = np.zeros((FOLDS, 3))
    for k in range(min(FOLDS, len(material.sequences))):
        others = fold != k
        if not others.any():
            raise ReplayError(
                "stopping.coefficients: must be given where a single sequence is served: acceptance is fitted to the "
                "positions of other sequences"
            )
        coefficients[k] = fit_logistic(x[others], labels[others])
    return coefficients[np.arange(len(material.sequences)) % FOLDS]


def predicted(coefficients: Floats, owner: Ints, confidence: Floats, entropy: Floats) -> Floats:
    """Give the probability of acceptance; arrays (slots, steps), `coefficients` by sequence, `owner` by slot."""
    return logistic(np.einsum("ijk,ik->ij", features(confidence, entropy), coefficients[owner]))


_NEIGHBOURS = 16
_HASH = 2654435761
"""Knuth's multiplicative hash (2^32 divided by the golden ratio)."""
_SAME = 1e-3
"""Confidence and entropy of two passes over one context differ by less than this."""


class Places(Protocol):
    """The part of `simulator.playback.replay.Replay` that signals ask."""

    run_length: Ints

    def positions(self, cursors: Ints) -> Ints:
        """Give the recorded positions that answer at `cursors`."""
        ...


@dataclass(frozen=True)
class Tails:
    """Tails of recorded rollouts, in order of the confidence at the wrong token; repeated beyond their `length`.

    `confidence` and `entropy` have shape (tails, steps behind the mismatch); `sure` is the confidence at the wrong
    token; `exact` gives for each flat place the row that holds its own tail, or -1.
    """

    confidence: Floats
    entropy: Floats
    length: Ints
    sure: Floats
    exact: Ints

    def donor(self, places: Ints, sure: Floats) -> Ints:
        """Give rows to borrow, for drafts from `places` that were so `sure` of their wrong token."""
        nearest = np.searchsorted(self.sure, sure)
        window = min(_NEIGHBOURS, len(self.sure))
        first = np.clip(nearest - window // 2, 0, len(self.sure) - window)
        donor: Ints = first + (places * _HASH % 2**32) * window // 2**32
        return donor


class RecordedSignals:
    """Confidence and entropy along a draft; see the module.

    `steps` counts the slots * steps that were asked for, `estimated_steps` those of them that were not recorded; a
    rule that stops earlier did not use them all.
    """

    def __init__(
        self,
        replay: Places,
        material: DrafterRecording,
        confidence: Floats,
        entropy: Floats,
        coefficients: Floats | None = None,
    ) -> None:
        self.steps = self.estimated_steps = 0
        self._replay, self._coefficients = replay, coefficients
        self._confidence, self._entropy = confidence, entropy
        self._owners = material.owners
        ends = material.starts + material.lengths
        self._to_come = ends[self._owners] - np.arange(len(self._owners))
        self._tails = _tails(material, confidence, entropy)

    def confidence(self, cursor: Ints, steps: int) -> Floats:
        """Give the drafter's largest probability, shape (slots, steps)."""
        return self._along(cursor, steps, self._confidence, self._tails.confidence)

    def entropy(self, cursor: Ints, steps: int) -> Floats:
        """Give the drafter's entropy in nats, shape (slots, steps)."""
        return self._along(cursor, steps, self._entropy, self._tails.entropy)

    def acceptance(self, cursor: Ints, steps: int) -> Floats:
        """Give the predicted probability of acceptance of each step's token, given those before it."""
        assert self._coefficients is not None
        counts = self.steps, self.estimated_steps
        confidence = self.confidence(cursor, steps)
        self.steps, self.estimated_steps = counts  # once for both
        entropy = self.entropy(cursor, steps)
        return predicted(self._coefficients, self._owners[self._replay.positions(cursor)], confidence, entropy)

    def _along(self, cursor: Ints, steps: int, recorded: Floats, tail: Floats) -> Floats:
        place = self._replay.positions(cursor)
        self.steps += len(place) * steps
        # Steps on the text; none is left where the whole text has been matched.
        certain = np.minimum(self._replay.run_length.take(cursor) + 1, self._to_come[place])[:, None]
        step = np.arange(1, steps + 1)
        values = recorded[place[:, None] + np.minimum(step, certain) - 1]
        behind = step - certain
        if int(certain.min()) >= steps:
            return np.asarray(values)
        row = self._tails.exact[place]
        borrowed = self._tails.donor(place, self._confidence[place + certain[:, 0] - 1])
        row, known = np.where(row >= 0, row, borrowed)[:, None], (row >= 0)[:, None]
        beyond = behind > 0
        self.estimated_steps += int(np.count_nonzero(beyond & ~(known & (behind <= self._tails.length[row]))))
        column = np.clip(behind - 1, 0, tail.shape[1] - 1)
        return np.asarray(np.where(beyond, tail[row, column], values))


def make_signals(
    replay: Places, material: DrafterRecording, *, predict: bool = False, coefficients: Floats | None = None
) -> RecordedSignals:
    """Compile the signals of a drafter; `predict` also fits, or takes, the model of acceptance.

    `coefficients` of (1, logit of the confidence, entropy) stand for every sequence; without them they are fitted,
    each sequence's to other sequences. Raises `ReplayError` where confidences, entropies or rollouts are missing.
    """
    if not material.traces.positions.num_rows or material.info.deterministic:
        raise ReplayError(
            f"drafter '{material.drafter}': a policy that reads confidence needs a drafter that has one; this one "
            f"({material.info.paradigm}) proposes given tokens"
        )
    confidence, entropy = material.columns("drafter_confidence", "drafter_entropy")
    for name, values in (("drafter_confidence", confidence), ("drafter_entropy", entropy)):
        material.whole(name, values, "a policy that reads the drafter's confidence or entropy")
    fitted = None
    if predict and coefficients is None:
        fitted = fit_by_fold(material, confidence, entropy)
    elif predict:
        fitted = np.broadcast_to(np.asarray(coefficients, dtype=np.float64), (len(material.sequences), 3))
    return RecordedSignals(replay, material, confidence, entropy, fitted)


def _tails(material: DrafterRecording, confidence: Floats, entropy: Floats) -> Tails:
    """Cut the recorded rollouts at their first wrong token."""
    names = ("step", "drafter_confidence", "drafter_entropy")
    table, place = material.rows(material.traces.rollouts, names)
    step = table["step"].to_numpy().astype(np.int64)
    if not len(step):
        raise ReplayError(
            f"rollouts.parquet: must hold rollouts of drafter '{material.drafter}' on the sequences served for a "
            "policy that reads confidence or entropy: what is felt behind the first wrong token; it has none"
        )
    first = np.flatnonzero(step == 1)
    count = np.diff(np.append(first, len(step)))
    start = place[first]
    paths = [_padded(table[name].to_numpy().astype(np.float64), first, count) for name in names[1:]]
    to_come = (material.starts + material.lengths)[material.owners[start]] - start
    runs, exact_key = _agreement(material, start, paths, count, to_come, (confidence, entropy))
    certain = np.minimum(runs + 1, to_come)
    length = np.maximum(count - certain, 0)
    sure = paths[0][np.arange(len(start)), np.minimum(certain, count) - 1]
    keep = np.flatnonzero(length > 0)
    if not len(keep):
        raise ReplayError(
            f"rollouts.parquet: rollouts of drafter '{material.drafter}' must go on behind their first wrong token; "
            "none does: record longer ones (gamma_max)"
        )
    keep = keep[np.lexsort((start[keep], sure[keep]))]
    width = int(length.max())
    columns = np.minimum(certain[keep, None] + np.arange(width), count[keep, None] - 1)
    cut = [path[keep[:, None], columns] for path in paths]
    exact = _own_rows(material, start[keep], length[keep], exact_key)
    return Tails(cut[0], cut[1], length[keep], sure[keep], exact)


def _padded(values: Floats, first: Ints, count: Ints) -> Floats:
    """Give runs of `values` as rows, each repeated beyond its end."""
    columns = np.minimum(np.arange(int(count.max())), count[:, None] - 1)
    return values[first[:, None] + columns]


def _agreement(
    material: DrafterRecording,
    start: Ints,
    paths: list[Floats],
    count: Ints,
    to_come: Ints,
    recorded: tuple[Floats, Floats],
) -> tuple[Ints, Ints | None]:
    """Give how many tokens of each rollout agree with the text, and the run lengths that tie starts to tails.

    Greedy: the recorded run lengths. Sampled: a rollout agrees as long as its confidence and entropy are those of the
    text's positions; nothing ties it to another draft.
    """
    if material.greedy:
        (runs,) = material.columns("run_length")
        return np.nan_to_num(runs[start]).astype(np.int64), np.nan_to_num(runs).astype(np.int64)
    width = paths[0].shape[1]
    step = np.arange(width)
    place = start[:, None] + np.minimum(step, to_come[:, None] - 1)
    same = (step < to_come[:, None]) & (step < count[:, None])
    for path, values in zip(paths, recorded, strict=True):
        same &= np.abs(path - values[place]) < _SAME
    agreeing = np.where(same.all(axis=1), width, np.argmin(same, axis=1))
    return np.maximum(agreeing - 1, 0), None


def _own_rows(material: DrafterRecording, start: Ints, length: Ints, runs: Ints | None) -> Ints:
    """Give for every flat place the row of the tail that is its own, or -1."""
    places = int(material.lengths.sum())
    exact = np.full(places, -1, dtype=np.int64)
    if runs is None:
        return exact
    exact[start] = np.arange(len(start))
    if not _sees_tokens_alone(runs, material):
        return exact
    # One place for each wrong token: a sequence of T tokens can go wrong at T of them, or match to its end.
    wrong = np.arange(places) + runs + material.owners
    row = np.full(places + len(material.sequences), -1, dtype=np.int64)
    shortest_first = np.argsort(length, kind="stable")
    row[wrong[start[shortest_first]]] = shortest_first
    own = exact < 0
    exact[own] = row[wrong[own]]
    return exact


def _sees_tokens_alone(runs: Ints, material: DrafterRecording) -> bool:
    """Whether the run lengths are those of match bits: n > 0 at t means n - 1 at t + 1."""
    inside = np.flatnonzero((runs[:-1] > 0) & (np.diff(material.owners) == 0))
    inside = np.setdiff1d(inside, material.starts)
    return bool((runs[inside + 1] == runs[inside] - 1).all())
