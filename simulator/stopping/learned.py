"""Draft lengths from the drafter's confidence, by a learned forecast of what the next token would gain."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.errors import ReplayError
from simulator.arrays import FloatArray, IntArray
from simulator.playback.predictor import FOLDS, features, fit_logistic, logistic
from simulator.playback.recorded import Material
from simulator.playback.signals import Places, RecordedSignals
from simulator.serving.round import Played, Round, Signals
from simulator.stopping.base import Policy
from simulator.stopping.forecast import draft_seconds, verify_seconds
from simulator.stopping.goodput import AcceptanceBySlot

_AHEAD = 3
"""Tokens that a step looks ahead: a drafter with a fixed price a round pays only with several."""
_START, _DECAY = 0.6, 0.9
"""Acceptance of a request that nothing is known of, and the weight of older rounds in it."""


class Outlook(Signals, Protocol):
    """Signals that also forecast acceptance, of tokens drafted and of the one after them."""

    def outlook(self, cursor: IntArray, steps: int, rate: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Give P(accepted) of the first token unseen (slots,), of each token seen, and of the one after each."""
        ...


class Learned(Policy):
    """Drafts on while the next tokens promise more tokens per second than the best length so far.

    After step j it knows confidence and entropy of the tokens drafted. S_j is the product of their predicted
    acceptances, E_j = 1 + S_1 + .. + S_j the expected tokens (bonus included), T_j the slot's share of the seconds of
    a round that drafts j steps; b_j predicts the acceptance of the token to come. A slot is willing to draft h tokens
    more where S_j (b_j + .. + b_j^h) T_j / E_j, what they are worth at its rate so far, exceeds what they cost it:
    that is where they raise E / T. The willing draft on, for the best h of 1 to 3, where what they gain together pays
    for what a step costs whoever drafts in it: the goodput rule of SmartSpec (Liu et al. 2024, arXiv 2406.14066) step
    by step, with a prediction for each token in the place of one acceptance rate. Before the first token it knows the
    request's acceptance so far. The predictions are logistic in the logit of the confidence, the entropy, their
    squares and product, and the request's acceptance so far, each sequence's fitted to other sequences. Our own rule.
    As exact as the signals; all that is drafted is verified.
    """

    needs_signals = True

    def __init__(self, max_draft_tokens: int, max_num_seqs: int) -> None:
        self.longest_draft = max_draft_tokens
        self._longest = max_draft_tokens
        self._acceptance = AcceptanceBySlot(_START, _DECAY, max_num_seqs)

    def opened(self, slots: IntArray) -> None:
        """Start these anew."""
        self._acceptance.forget(slots)

    def observe(self, round_: Round, played: Played) -> None:
        """Add the round to each slot's acceptance."""
        self._acceptance.observe(round_.slots, played)

    def draft_tokens(self, round_: Round) -> IntArray:
        """Give the lengths at which the rule stops."""
        signals: Outlook = round_.signals  # type: ignore[assignment]
        rate = self._acceptance.rates(round_.slots)
        first, seen, after = signals.outlook(round_.cursor, self._longest, rate)
        start_s, fixed_s, own_s = shares(round_, self._longest)
        tokens, survival, taken_s = (np.full(round_.active, value) for value in (1.0, 1.0, start_s))
        length = np.zeros(round_.active, dtype=np.int64)
        drafting = np.ones(round_.active, dtype=bool)
        for step in range(self._longest):
            onward = first if step == 0 else after[:, step - 1]
            gain = survival[:, None] * np.cumsum(onward[:, None] ** np.arange(1, _AHEAD + 1), axis=1)
            worth_s = gain * (taken_s / tokens)[:, None]
            drafting = worth_it(drafting, worth_s, own_s[step : step + _AHEAD], fixed_s[step : step + _AHEAD])
            if not drafting.any():
                break
            length += drafting
            survival = survival * seen[:, step]
            tokens = tokens + survival
            taken_s = taken_s + own_s[step] + fixed_s[step] / drafting.sum()
        return length


def worth_it(
    drafting: NDArray[np.bool_], worth_s: FloatArray, own_s: FloatArray, fixed_s: FloatArray
) -> NDArray[np.bool_]:
    """Give who drafts on: the slots whose next h tokens are worth more than their own seconds, for the best h.

    `worth_s` (slots, steps ahead): what the tokens up to each step ahead are worth; `own_s`, `fixed_s` (steps ahead):
    seconds of each step for a slot, and for all. Nobody, where what they gain does not pay for what is fixed.
    """
    best, most = np.zeros_like(drafting), 0.0
    for ahead in range(1, len(own_s) + 1):
        surplus_s = worth_s[:, ahead - 1] - own_s[:ahead].sum()
        willing = drafting & (surplus_s > 0)
        total_s = float(surplus_s[willing].sum() - fixed_s[:ahead].sum())
        if total_s > most:
            best, most = willing, total_s
    return best


def shares(round_: Round, longest: int) -> tuple[float, FloatArray, FloatArray]:
    """Give a slot's seconds of a round without a draft, and of each step the seconds that are fixed and a slot's own.

    Prices are taken as straight lines between one slot that drafts and all of them: exact for linear costs.
    """
    active = round_.active
    every = np.full(active, longest, dtype=np.int64)
    verify_s = verify_seconds(round_, np.arange(longest + 1) * active)
    beside_s = verify_s - round_.prices.overhead_s
    draft_s = np.diff(draft_seconds(round_.prices, round_.context, every, beside_s))
    alone_s = np.diff(draft_seconds(round_.prices, round_.context[:1], every[:1], beside_s))
    slope_s = (draft_s - alone_s) / (active - 1) if active > 1 else np.zeros(longest)
    slope_s = np.clip(slope_s, 0.0, draft_s / active)
    own_s = slope_s + np.diff(verify_s) / active
    return float(verify_s[0] / active), draft_s - slope_s * active, own_s


class OutlookSignals(RecordedSignals):
    """Signals with the forecasts that `Learned` reads, fitted to the sequences of other folds.

    Three logistic models on positions on the text: acceptance of a token by its own signals; of the token after an
    accepted one by that one's signals; of a first token by nothing but acceptance so far. Labels are acceptance
    probabilities (greedy: matched or not).
    """

    def __init__(self, replay: Places, material: Material, confidence: FloatArray, entropy: FloatArray) -> None:
        super().__init__(replay, material, confidence, entropy)
        self._own, self._next, self._first = fit_outlook(material, confidence, entropy)

    def outlook(self, cursor: IntArray, steps: int, rate: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Give P(accepted) of the first token unseen (slots,), of each token seen, and of the one after each."""
        counts = self.steps, self.estimated_steps
        confidence = self.confidence(cursor, steps)
        self.steps, self.estimated_steps = counts  # once for both
        x = with_rate(features(confidence, self.entropy(cursor, steps)), rate[:, None])
        fold = self._owners[self._replay.positions(cursor)] % FOLDS
        own, following = (logistic(np.einsum("ijk,ik->ij", x, b[fold])) for b in (self._own, self._next))
        first = logistic(np.einsum("ik,ik->i", _alone(rate), self._first[fold]))
        return first, own, following


def _alone(rate: FloatArray) -> FloatArray:
    """Give (1, logit of the acceptance so far)."""
    return np.stack([np.ones_like(rate), np.log(rate / (1 - rate))], axis=-1)


def with_rate(x: FloatArray, rate: FloatArray) -> FloatArray:
    """Give `x` (1, logit of confidence, entropy) with their squares, product and the logit of acceptance so far."""
    spread = np.broadcast_to(np.log(rate / (1 - rate)), x.shape[:-1])
    sure, entropy = x[..., 1], x[..., 2]
    more = np.stack([sure**2 / 10, entropy**2 / 10, sure * entropy / 10, spread], axis=-1)
    return np.concatenate([x, more], axis=-1)


def fit_outlook(
    material: Material, confidence: FloatArray, entropy: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Give the coefficients of the three models, one row a fold, each fitted to the other folds."""
    (accepted,) = material.columns("accept_probability")
    owners, fold = material.owners, material.owners % FOLDS
    if min(FOLDS, len(material.sequences)) < 2:
        raise ReplayError(
            "stopping.policy: 'learned' must have at least 2 sequences: each is predicted by a fit to the others"
        )
    rate = acceptance_so_far(material, accepted)
    known = np.isfinite(accepted) & np.isfinite(confidence) & np.isfinite(entropy)
    x = with_rate(features(np.nan_to_num(confidence, nan=0.5), np.nan_to_num(entropy)), rate)
    goes_on = np.append(owners[1:] == owners[:-1], False) & known & (np.nan_to_num(accepted) > 0.5)
    following = np.append(accepted[1:], np.nan)
    goes_on &= np.isfinite(following)
    own, after, first = [], [], []
    for part in range(FOLDS):
        own.append(_fit(x, accepted, known & (fold != part)))
        after.append(_fit(x, following, goes_on & (fold != part)))
        first.append(_fit(_alone(rate), accepted, known & (fold != part)))
    return np.array(own), np.array(after), np.array(first)


def _fit(x: FloatArray, labels: FloatArray, rows: NDArray[np.bool_]) -> FloatArray:
    return fit_logistic(x[rows], labels[rows])


def acceptance_so_far(material: Material, accepted: FloatArray) -> FloatArray:
    """Give for every position the acceptance that `Learned` would know there, drafting four tokens a round."""
    rate = np.full(len(accepted), _START)
    tracker = AcceptanceBySlot(_START, _DECAY, 1)
    slot = np.zeros(1, dtype=np.int64)
    four = np.array([4])
    matched = np.nan_to_num(accepted)
    for start, length in zip(material.starts.tolist(), material.lengths.tolist(), strict=True):
        tracker.forget(slot)
        at, end = start + 1, start + length
        while at < end:
            ahead = matched[at : min(at + 4, end)] > 0.5
            run = int(len(ahead) if ahead.all() else np.argmin(ahead))
            rate[at : min(at + run + 1, end)] = tracker.rates(slot)[0]
            got = np.array([run])
            tracker.observe(slot, Played(four, got, got + 1, 0.0, 0.0, 0.0))
            at += run + 1
    return np.asarray(np.clip(rate, 1e-3, 1 - 1e-3), dtype=np.float64)


def make_outlook(replay: Places, material: Material) -> OutlookSignals:
    """Compile the signals and fit the forecasts.

    Raises `ReplayError` where confidences, entropies or rollouts are missing.
    """
    names = ("drafter_confidence", "drafter_entropy")
    confidence, entropy = material.columns(*names)
    for name, values in zip(names, (confidence, entropy), strict=True):
        material.whole(name, values, "stopping.policy 'learned'")
    return OutlookSignals(replay, material, confidence, entropy)
