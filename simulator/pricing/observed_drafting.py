"""Drafting as an engine's own steps price it: by the drafter's steps, or by what rounds took beyond verification."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.common.arrays import Floats
from calibration.common.errors import CostError
from simulator.pricing.fitted import digits, solve
from simulator.pricing.observed import (
    ObservedPrefill,
    ObservedRound,
    ObservedStep,
    PromptTokens,
    fit_observed,
    price_rows,
    weights_of,
)
from simulator.pricing.steps import EngineSteps, Shapes, rows_of, tidied


class Verified(NamedTuple):
    """What the verifier's price is fitted to: arguments of `fit_observed`."""

    steps: EngineSteps
    model: str
    head_share: float


class Drafting(NamedTuple):
    """The price of a draft step (`rounds`: of all drafting of a round), and of the drafter's own prefill."""

    step: ObservedStep | ObservedRound
    prefill: ObservedPrefill | PromptTokens | None = None

    @property
    def rounds(self) -> bool:
        """Whether the price is that of a whole round."""
        return isinstance(self.step, ObservedRound)


@functools.lru_cache(maxsize=32)
def fit_drafting(steps: EngineSteps, drafter: str, one_shot: bool, verified: Verified | None) -> Drafting:
    """Give the price of drafting by `drafter` in `steps`.

    Where the engine timed its drafter, the mean seconds of a draft step by sequences and cached tokens; tokens that
    a drafter catches up on after a round are in these means. Steps on prompts are told apart (more tokens a sequence
    than a draft can leave behind) and priced as prefill. Where it did not, what the rounds with drafts took beyond
    the verifier's price. Where no run of these drafted, a `one_shot` drafter (prompt lookup: no model) is free: what
    it takes on the host is not known; any other is a `CostError`.
    """
    own = steps.of(drafter, "draft")
    if own.num_rows:
        return _by_steps(steps, drafter, own)
    rounds = _rounds(steps, verified)
    if verified is not None and rounds is not None:
        return _by_rounds(steps, drafter, one_shot, verified, rounds)
    if one_shot:
        return Drafting(ObservedRound(drafter, steps.names))
    raise CostError(
        f"measured runs {', '.join(steps.names)}: no draft step of '{drafter}' and no round with drafted tokens; "
        "give [costs.drafter] kind = 'observed' with runs in which it drafted"
    )


def _by_steps(steps: EngineSteps, drafter: str, own: pa.Table) -> Drafting:
    rows, of_prompts = rows_of(own), _of_prompts(own)
    if of_prompts.all():
        raise CostError(f"measured runs {', '.join(steps.names)}: '{drafter}' only read prompts, it never drafted")
    none = np.zeros(len(rows))
    drafting = replace(rows, tokens=rows.sequences, changed=none)
    read = replace(
        drafting,
        sequences=none,
        tokens=none,
        context=none,
        prompts=rows.sequences,
        prompt_tokens=rows.tokens,
        prompt_context=rows.context,
    )
    each = Shapes(*(np.where(of_prompts, getattr(read, f.name), getattr(drafting, f.name)) for f in fields(Shapes)))
    prefill, step = price_rows(each, steps.names, drafter, "draft")
    return Drafting(step, prefill)


def _of_prompts(own: pa.Table) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Say which draft steps read prompts: more new tokens a sequence than the longest draft can have left behind."""
    steps = np.stack([own[name].to_numpy() for name in ("run", "repeat", "step")], axis=1)
    longest = int(np.unique(steps, axis=0, return_counts=True)[1].max())
    tokens, sequences, seconds = (own[name].to_numpy() for name in ("new_tokens", "sequences", "seconds"))
    kept = (seconds > 0) & (sequences > 0)
    return np.asarray((tokens > (longest + 1) * sequences)[kept])


def _rounds(steps: EngineSteps, verified: Verified | None) -> Shapes | None:
    """Give the verifier's steps (each of its own) in runs that drafted; None where there is none."""
    if verified is None:
        return None
    own = steps.of(verified.model, "decode", "prefill", "mixed")
    drafted = own.filter(pc.greater(own["drafted_tokens"], 0))
    return rows_of(own.filter(pc.is_in(own["run"], drafted["run"].unique()))) if drafted.num_rows else None


def _by_rounds(steps: EngineSteps, drafter: str, one_shot: bool, verified: Verified, rows: Shapes) -> Drafting:
    prefill, verify = fit_observed(*verified)

    def priced(some: Shapes) -> Floats:
        seconds = verify.step_seconds(some.sequences, some.tokens, some.context) + verify.change_s * some.changed
        return np.asarray(seconds)

    rounds, read = rows[rows.prompts == 0], rows[rows.sequences == 0]
    shapes = tidied(rounds, lambda usual: priced).shapes
    drafted = shapes.tokens - shapes.sequences
    columns = [np.ones(len(shapes)), drafted / shapes.sequences, drafted]
    beyond = shapes.seconds - priced(shapes)
    round_s, step_s, token_s = solve(columns, beyond, shapes.seconds, weights_of(shapes)).tolist()
    price = ObservedRound(drafter, steps.names, round_s, step_s, token_s, len(rounds))
    if one_shot or len(read) == 0:
        return Drafting(price)
    usual = prefill.step_seconds(read.prompts, read.prompt_tokens, read.prompt_context)
    beyond = read.seconds - usual - prefill.change_s * read.changed
    token_s = digits(beyond.sum() / read.prompt_tokens.sum())
    return Drafting(price, PromptTokens(max(token_s, 0.0)))
