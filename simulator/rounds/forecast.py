"""What-if prices: how long a round would take, from the engine's own profile of step times."""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.pricing.costs import DraftFraction, DraftPerStep, Prices
from simulator.rounds.round import Round


def verify_seconds(round_: Round, drafted_tokens: Ints) -> Floats:
    """Give overhead, prefill and verification, where `drafted_tokens` (any shape) are verified beside the batch.

    Padded to captured batch sizes as the engine pads; prefill chunks cost what `Prices.added_prefill_s` says.
    """
    prices, tokens = round_.prices, round_.active + drafted_tokens
    if prices.capture_sizes:
        sizes = np.array(prices.capture_sizes)
        place = np.searchsorted(sizes, tokens)
        tokens = np.where(place < len(sizes), sizes[np.minimum(place, len(sizes) - 1)], tokens)
    seconds = prices.verify.step_seconds(round_.active, tokens, int(round_.context.sum())) + prices.overhead_s
    if round_.batch_tokens:
        prefill = prices.prefill.step_seconds
        seconds = seconds + float(prefill(1, round_.batch_tokens, 0)) - float(prefill(1, 0, 0))
    return np.asarray(seconds, dtype=np.float64)


def draft_seconds(prices: Prices, context: Ints, lengths: Ints, verify_s: Floats) -> Floats:
    """Give the drafting of min(lengths, L) tokens per slot for L = 0, 1, .. max(lengths), in lock step.

    `verify_s` (as long): verification in each case, of which some drafters are said to take a fraction.
    """
    longest = int(lengths.max())
    draft = prices.draft
    if draft is None:
        return np.zeros(longest + 1)
    if isinstance(draft, DraftFraction):
        return np.asarray(draft.seconds(lengths, context, 1.0)[0] * verify_s * (np.arange(longest + 1) > 0))
    at_least = len(lengths) - np.bincount(lengths, minlength=longest + 1).cumsum()[:longest]
    if isinstance(draft, DraftPerStep):
        done = np.bincount(lengths, weights=context, minlength=longest + 1).cumsum()[:longest]
        cached = context.sum() - done + np.arange(longest) * at_least
        steps = draft.step.step_seconds(at_least, at_least, cached)
        return np.concatenate(([0.0], np.cumsum(steps)))
    new = np.concatenate(([0], np.cumsum(at_least))) if draft.tokens else np.full(longest + 1, len(lengths))
    seconds = np.asarray(draft.step.step_seconds(len(lengths), new, int(context.sum())), dtype=np.float64)
    return np.where(np.arange(longest + 1) > 0, seconds, 0.0)  # asked for nothing, the drafter does not run


def capped_seconds(round_: Round, lengths: Ints) -> Floats:
    """Give the seconds of this round if slot i drafted min(lengths_i, L) tokens, for L = 0, 1, .. max(lengths)."""
    longest = int(lengths.max())
    at_least = len(lengths) - np.bincount(lengths, minlength=longest + 1).cumsum()[:longest]
    verify_s = verify_seconds(round_, np.concatenate(([0], np.cumsum(at_least))))
    return verify_s + draft_seconds(round_.prices, round_.context, lengths, verify_s - round_.prices.overhead_s)


def even_seconds(round_: Round, longest: int) -> Floats:
    """Give the seconds of this round if every slot drafted k tokens, for k = 0 .. `longest`."""
    return capped_seconds(round_, np.full(round_.active, longest, dtype=np.int64))
