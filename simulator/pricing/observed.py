"""Step costs fitted to an engine's own steps: what its plain runs tell about steps that it has not taken yet.

All is built on one assumption: an iteration is *one forward pass over all its tokens*, and a token costs the same
layers whether it is drafted, decoded or part of a prompt. A step in which b sequences have N new (drafted ones
included) and C cached tokens between them, and P tokens of s prompts are computed, takes

    f(T) + head_s (L - 1) + sequence_s (n - 1) + context_s C + further_s (N - b) + pair_s A + beside_s [b, s > 0]
    + change_s [T is not that of the step before]

    T = N + P tokens,  n = b + s sequences,  L = N + s tokens in the LM head,  A = P (P / 2 + cached) / s

f is piecewise linear and never falls, and no coefficient but `beside_s` is negative; beyond the most tokens of any
step f goes on with the steeper of its last and its mean slope. Every coefficient is fitted to all steps together:

- Without speculation N = b, and f alone says what a drafted token costs. Prompts and batches of equal tokens together
  tell tokens from sequences: `sequence_s` is the least that lets f never fall.
- `further_s`: what each further token of a sequence takes beyond f (it attends to its cached tokens once more, and
  is sampled). Where no step had N > b it is 0, an assumption: rounds priced from plain runs alone come out too cheap
  on a CPU. Of four forms (by token, by round, by round and cached tokens, by pairs of tokens) this one erred least on
  rounds of a CPU engine that the fit had not seen.
- `head_s` is not fitted: FLOPs of the LM head over those of the layers, times the slope of f where prompts are long.
- `change_s`: engines prepare their kernels for a number of tokens; another one than before costs anew.
- `beside_s`: what a step with both takes beyond one joint pass; 0, an assumption, where no such step was seen.
- A, the pairs of tokens that attend to each other, is exact for prompts of equal length.

Coefficients minimise squared relative errors over shapes of steps, each with the mean of its seconds (throughputs add
up means) and the weight n / (n + 25) for n steps: a single step scatters about five times as much as the form errs.

Prices of steps as an engine itself took them; `simulator.pricing.observed` says how they are fitted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from calibration.common.arrays import Floats, Mask
from calibration.common.errors import CostError, did_you_mean
from simulator.pricing.fitted import Curve, CurveStep, Fitness, Range, curve_of, fitness, hinges, left_out, solve
from simulator.pricing.grades import OBSERVED, StepGrade
from simulator.pricing.steps import EngineSteps, Shapes, family_keys, numbered, rows_of, tidied


@dataclass(frozen=True)
class ObservedStep(CurveStep):
    """Seconds of the decode or verify steps of an engine, or of the steps of a drafter in it."""

    runs: tuple[str, ...]
    fitness: Fitness
    assumed: tuple[str, ...] = ()
    change_s: float = 0.0
    """What a step takes longer that computes another number of tokens than the one before."""
    further_s: float = 0.0
    """What each further token of a sequence takes beyond what one of another sequence takes."""

    def step_seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give seconds; arguments broadcast. Both token counts are sums over the batch."""
        seconds = super().step_seconds(batch, new_tokens, context_tokens)
        return seconds + self.further_s * (new_tokens - batch) if self.further_s else seconds

    @property
    def rests_on(self) -> str:
        """What its seconds rest on."""
        return "fitted to steps of an engine"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return OBSERVED

    def describe(self) -> dict[str, Any]:
        """Give where the price comes from, how well it tells these steps, and what it assumes."""
        low, high, batch, context = self.range
        measured_range = {
            "batch": [1, int(batch)],
            "new_tokens_in_batch": [int(low), int(high)],
            "context_tokens_per_sequence": [0, int(context)],
        }
        told = {"kind": "observed", "model": self.model, "operation": self.operation, "runs": list(self.runs)}
        change = {name: value for name in ("change_s", "further_s") if (value := getattr(self, name))}
        assumed = {"assumed": list(self.assumed)} if self.assumed else {}
        return told | self.fitness.describe() | change | {"measured_range": measured_range} | assumed


@dataclass(frozen=True)
class ObservedPrefill(ObservedStep):
    """Seconds of steps that prefill prompts, alone or beside tokens that decode."""

    pair_s: float = 0.0
    beside_s: float = 0.0
    mixed: Fitness | None = None

    def step_seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give seconds; arguments broadcast. Both token counts are sums over the batch."""
        return super().step_seconds(batch, new_tokens, 0) + self.pair_s * pairs(batch, new_tokens, context_tokens)

    def added_seconds(self, batch: int, new_tokens: int, context_tokens: int, beside_tokens: int) -> float:
        """Give what prefilling adds to a step that computes `beside_tokens` of others anyway."""
        joint = super().step_seconds(batch + 1, beside_tokens + new_tokens, 0)
        attention = self.pair_s * pairs(batch, new_tokens, context_tokens)
        return max(float(joint + attention - super().step_seconds(1, beside_tokens, 0)) + self.beside_s, 0.0)

    def describe(self) -> dict[str, Any]:
        """Give where the price comes from, that of mixed steps too."""
        mixed = {} if self.mixed is None else {"mixed": {**self.mixed.describe(), "beside_s": self.beside_s}}
        return super().describe() | mixed


@dataclass(frozen=True)
class ObservedRound:
    """Seconds that drafting adds to a round: round_s + step_s D / b + token_s D, for D drafted tokens of b sequences.

    For engines that do not tell their drafters' steps: what the steps of `runs` took beyond the verifier's price.
    """

    model: str
    runs: tuple[str, ...]
    round_s: float = 0.0
    step_s: float = 0.0
    token_s: float = 0.0
    rounds: int = 0

    def step_seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give seconds; arguments broadcast. `new_tokens` are the drafted ones, a sum over the batch."""
        return self.round_s + self.step_s * new_tokens / batch + self.token_s * new_tokens + 0 * context_tokens

    def outside(self, batch: float, new_tokens: float, context_tokens: float) -> bool:
        """Never: the verifier's step of the same round says it."""
        return False

    @property
    def rests_on(self) -> str:
        """What its seconds rest on."""
        return "fitted to steps of an engine"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return OBSERVED

    def describe(self) -> dict[str, Any]:
        """Give the constants and where they come from."""
        why = "what rounds took beyond the verifier's price" if self.rounds else "no step of these runs drafted"
        constants = {"round_s": self.round_s, "step_s": self.step_s, "token_s": self.token_s}
        told = {"kind": "observed", "model": self.model, "operation": "draft", "runs": list(self.runs)}
        return told | {"rounds": self.rounds, **constants, "assumed": [f"no draft steps are told: {why}"]}


@dataclass(frozen=True)
class PromptTokens:
    """What a drafter adds to prefill, `token_s` a prompt token, where an engine does not tell its steps."""

    token_s: float

    def step_seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give seconds; arguments broadcast. `new_tokens` is a sum over the batch."""
        return self.token_s * new_tokens


def pairs(batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
    """Give how many pairs of tokens attend to each other in `batch` prompts of equal length; arguments broadcast."""
    return new_tokens * (new_tokens / 2 + context_tokens) / batch


TRUSTED_STEPS = 25.0
"""Steps from which on the mean of a shape scatters less than the form of the fit errs."""
_KNOTS, _OFTEN = 16, 8
"""Most knots of f among the tokens of decode steps, and the steps that a knot must have."""
_KNOTS_APART = 2.0
"""Least ratio of its knots beyond: prompts have any number of tokens, and closer knots would fit noise."""
_LEAST = 0.02
"""Weight of keeping `sequence_s` small, far below that of a step: it only decides what the steps leave open."""


class Law(NamedTuple):
    """The formula above with its coefficients; `forward`: f."""

    forward: Curve
    head_s: float
    sequence_s: float
    context_s: float
    further_s: float
    pair_s: float
    beside_s: float
    change_s: float

    def seconds(self, shapes: Shapes) -> Floats:
        """Give the seconds of steps."""
        of = self.forward.seconds(1, shapes.forward_tokens, 0) + self.head_s * _head_rows(shapes)
        linear = (self.sequence_s, self.context_s, self.further_s, self.pair_s, self.beside_s, self.change_s)
        of = of + sum(price * column for price, column in zip(linear, _linear(shapes), strict=True))
        return np.asarray(np.maximum(of, 1e-12), dtype=np.float64)

    def times(self, factor: float) -> Law:
        """Give the law of steps that take `factor` times as long."""
        return Law(self.forward.times(factor), *(value * factor for value in self[1:]))

    @property
    def decoding(self) -> Curve:
        """What steps without prompts take, `change_s` left out."""
        values = self.forward.values + self.head_s * (self.forward.knots - 1)
        beyond_s = self.forward.beyond_s + self.head_s
        return Curve(self.forward.knots, values, beyond_s, self.sequence_s, self.context_s, 0.0)

    @property
    def prefill(self) -> Curve:
        """What steps with prompts alone take, `change_s` and attention left out."""
        return self.forward._replace(batch_s=self.head_s + self.sequence_s)


def _head_rows(shapes: Shapes) -> Floats:
    return shapes.tokens + shapes.prompts - 1


def _linear(shapes: Shapes) -> tuple[Floats, ...]:
    """Give the columns of the linear terms, those of `Law.seconds` in its order."""
    prompts = np.maximum(shapes.prompts, 1)
    return (
        shapes.sequences + shapes.prompts - 1,
        shapes.context,
        shapes.tokens - shapes.sequences,
        pairs(prompts, shapes.prompt_tokens, shapes.prompt_context),
        ((shapes.sequences > 0) & (shapes.prompts > 0)).astype(np.float64),
        shapes.changed,
    )


def fit_law(shapes: Shapes, head_share: float = 0.0) -> Law:
    """Fit the law to shapes of steps."""
    tokens = shapes.forward_tokens
    knots, first = _knots(shapes), np.ones(len(shapes))
    if len(knots) == 1:  # one number of tokens only: in proportion to it
        knots, first = np.array([0.0, float(tokens.max())]), np.zeros(len(shapes))
    linear = [column * known for column, known in zip(_linear(shapes), _told(shapes), strict=True)]
    linear.append(-linear[4])  # `beside_s` may be negative
    columns = [first, *hinges(tokens, knots), *linear]
    least = [np.zeros(1)] * len(columns)
    least[len(knots)] = np.array([_LEAST * max(float(linear[0].max()), 1.0)])
    padded = [np.append(column, row) for column, row in zip(columns, least, strict=True)]
    weights = np.append(weights_of(shapes), 1.0)
    near, head_s = shapes.seconds, 0.0
    for _ in range(3):  # relative to what was fitted first: relative to noisy seconds, it would come out too low
        known_s = head_s * _head_rows(shapes)
        seconds, unit = np.append(shapes.seconds - known_s, 0.0), np.append(near, float(np.median(near)))
        solution = solve(padded, seconds, unit, weights)
        sequence_s, context_s, further_s, pair_s, beside_s, change_s, less_s = solution[len(knots) :].tolist()
        forward = curve_of(knots, solution[: len(knots)])
        law = Law(
            forward=forward,
            head_s=head_s,
            sequence_s=sequence_s,
            context_s=context_s,
            further_s=further_s,
            pair_s=pair_s,
            beside_s=beside_s - less_s,
            change_s=change_s,
        )
        near, head_s = law.seconds(shapes), head_share * _far_slope(forward)
    return law


def _told(shapes: Shapes) -> tuple[bool, ...]:
    """Say which linear terms these steps tell from f, in the order of `Law.seconds`."""
    decoding = shapes.prompts == 0
    wider = shapes.tokens > shapes.sequences
    several = bool((shapes.prompts > 1).any() or (shapes.prompt_context > 0).any())
    alone, changed = decoding & ~wider, shapes.changed[decoding] > 0
    return True, True, bool(wider.any() and alone.any()), several, True, bool(changed.any() and not changed.all())


def _far_slope(forward: Curve) -> float:
    """Give the slope of f over the last three quarters of its tokens."""
    top = float(forward.knots[-1])
    return float(forward.seconds(1, top, 0) - forward.seconds(1, top / 4, 0)) / (0.75 * top)


def _knots(shapes: Shapes) -> Floats:
    """Give 0 and the knots of f but the first: f(0) and a slope to it would say the same."""
    decoding = shapes.prompts == 0
    tokens, steps = shapes.tokens[decoding], shapes.steps[decoding]
    values, where = np.unique(tokens, return_inverse=True)
    times = np.bincount(where.ravel(), weights=steps)
    values, times = values[times >= _OFTEN], times[times >= _OFTEN]
    if len(values) > _KNOTS:
        chosen = np.searchsorted(np.cumsum(times) / times.sum(), np.linspace(0, 1, _KNOTS) - 1e-9)
        values = values[np.unique(np.clip(chosen, 0, len(values) - 1))]
    longer = np.unique(shapes.forward_tokens)
    longer = longer[longer > values[-1]] if len(values) else longer
    found = values.tolist()
    for value in longer:
        last = value == longer[-1]
        if last or not found or (value >= _KNOTS_APART * found[-1] and longer[-1] >= _KNOTS_APART * value):
            found.append(float(value))
    return np.array([0.0, *found[1:]])


def weights_of(shapes: Shapes) -> Floats:
    """Give what each of `shapes` counts in a fit: n / (n + 25)."""
    return np.asarray(shapes.steps / (shapes.steps + TRUSTED_STEPS))


# --- prices


@functools.lru_cache(maxsize=32)
def fit_observed(steps: EngineSteps, model: str, head_share: float = 0.0) -> tuple[ObservedPrefill, ObservedStep]:
    """Give the prices of (prefill, decode and verify) steps of `model`, fitted to `steps`.

    `head_share`: FLOPs of the LM head over those of the layers, for one token. Raises `CostError` where the model
    took no such steps.
    """
    where = f"measured runs {', '.join(steps.names)}"
    if model not in steps.models:
        raise CostError(f"{where}: no steps of '{model}'{did_you_mean(model, steps.models)}")
    rows = rows_of(steps.of(model, "decode", "prefill", "mixed"))
    for some, what in ((rows.prompts == 0, "decode"), (rows.sequences == 0, "prefill")):
        if not some.any():
            raise CostError(f"{where}: no {what} step of '{model}'; add a run that has some")
    prefill, decoding = price_rows(rows, steps.names, model, "verify", head_share)
    assert prefill is not None
    return prefill, decoding


def price_rows(
    rows: Shapes, names: tuple[str, ...], model: str, operation: str, head_share: float = 0.0
) -> tuple[ObservedPrefill | None, ObservedStep]:
    """Give the prices of (prefill, where `rows` have any, and decode steps); each of `rows` is a step."""

    def fit(shapes: Shapes) -> Callable[[Shapes], Floats]:
        return fit_law(shapes, head_share).seconds

    tidy = tidied(rows, fit)
    shapes = tidy.shapes
    law = fit_law(shapes, head_share)
    predicted = law.seconds(shapes)
    held_out = left_out(numbered(family_keys(shapes)), lambda keep: fit(shapes[keep])(shapes[~keep]))
    dear = law.times(1 + tidy.outliers)

    def told(keep: Mask) -> Fitness:
        return fitness(tidy[keep], predicted[keep], None if held_out is None else held_out[keep])

    decoding, alone = shapes.prompts == 0, shapes.sequences == 0
    mixed = ~(decoding | alone)
    assumed = []
    if (shapes.tokens <= shapes.sequences).all() and operation == "verify":
        assumed.append(
            "no step had several tokens of a sequence: a drafted token costs what one of another sequence costs"
        )
    step = ObservedStep(
        model=model,
        operation=operation,
        curve=dear.decoding,
        range=_decoded(shapes[decoding]),
        runs=names,
        fitness=told(decoding),
        assumed=tuple(assumed),
        change_s=dear.change_s,
        further_s=dear.further_s,
    )
    if decoding.all():
        return None, step
    return ObservedPrefill(
        model=model,
        operation="prefill",
        curve=dear.prefill,
        range=_read(shapes[~decoding]),
        runs=names,
        fitness=told(alone),
        assumed=() if mixed.any() else ("no step had prompts beside decoding: one pass for both",),
        change_s=dear.change_s,
        pair_s=dear.pair_s,
        beside_s=dear.beside_s,
        mixed=told(mixed) if mixed.any() else None,
    ), step


def _decoded(shapes: Shapes) -> Range:
    most = float(shapes.sequences.max()), float((shapes.context / shapes.sequences).max())
    return Range(float(shapes.tokens.min()), float(shapes.tokens.max()), *most)


def _read(shapes: Shapes) -> Range:
    most = float(shapes.prompts.max()), float((shapes.prompt_context / shapes.prompts).max())
    return Range(float(shapes.prompt_tokens.min()), float(shapes.prompt_tokens.max()), *most)
