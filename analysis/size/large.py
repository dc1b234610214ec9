"""Costs and curves of a verifier that nobody here can load, from published shapes: all extrapolated.

A round drafts k tokens, one drafter step each, and verifies k + 1: the roofline prices both from layers, widths,
launches and host time (`simulator.pricing.roofline`). A drafter runs on as many of the verifier's devices as make its
step shortest, one or all. Its acceptance is drawn by `analysis.size.law`; tokens per round follow from a constant
rate. Each draw also moves the price of drafting against that of verifying by the roofline's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from analysis.common.bootstrap import LEVEL, Estimate, number
from analysis.size.facts import tokens_per_round
from analysis.size.findings import (
    Excluded,
    SizeCurve,
    SizePoint,
    SweetSpot,
    flat_words,
    interval_text,
    parameters_interval,
    parameters_text,
    scaled,
    speedup_text,
)
from analysis.size.settings import Place, SizeSettings
from analysis.size.sweetspot import find_spots, likely_best, made_shape, shares_of
from calibration.common.arrays import Floats
from calibration.common.errors import CalibrationError, CostError
from calibration.shapes.shapes import Shape, get_shape
from simulator.hardware.work import Efficiencies
from simulator.pricing.roofline import RooflineStep, roofline_step

SHARES = tuple(float(f"{n:.3g}") for n in np.geomspace(0.0007, 0.2, 24))
"""Shares of made-up drafters, before their widths are rounded: from the least to the largest that any family was
measured at (LaMDA 100M for 137B, a fifth of SmolLM2-135M)."""

_DEVIATION = 1.2533
"""Standard deviation of a normal error over its mean absolute value: sqrt(pi / 2)."""


@dataclass(frozen=True)
class Drafter:
    """A drafter of the large verifier: its shape and parameters in all (a tied embedding once)."""

    name: str
    shape: Shape

    @property
    def parameters(self) -> float:
        """Parameters in all."""
        return float(self.shape.parameters)


def competing(verifier: Drafter, drafters: Sequence[Drafter]) -> tuple[tuple[Drafter, ...], tuple[Excluded, ...]]:
    """Give the drafters with the vocabulary of `verifier`, and those that do not compete, with the reason.

    A drafted token is verified by its number: one of another vocabulary means something else or nothing.
    """
    kept, out = [], []
    whose = verifier.shape.tokenizer
    for drafter in drafters:
        mine = drafter.shape.tokenizer
        if mine is not None and mine == whose:
            kept.append(drafter)
        elif mine is None or whose is None:
            out.append(Excluded(drafter.name, "whose vocabulary it has is not known"))
        else:
            out.append(Excluded(drafter.name, f"it has the vocabulary of {mine}, {verifier.name} that of {whose}"))
    return tuple(kept), tuple(out)


@dataclass(frozen=True)
class Costs:
    """Seconds of verifying drafts of k = 0 .. K tokens, shape (K + 1), and of one draft step, shape (drafters)."""

    verify_s: Floats
    draft_s: Floats

    @property
    def ratio(self) -> Floats:
        """A draft step over a plain verifier step."""
        return np.asarray(self.draft_s / self.verify_s[0])

    @property
    def seconds(self) -> Floats:
        """Of rounds, shape (drafters, K + 1)."""
        return np.asarray(self.verify_s + np.arange(len(self.verify_s)) * self.draft_s[:, None])


@dataclass(frozen=True)
class Drawn:
    """What is drawn once and used everywhere, so that curves are compared on the same draws.

    ``acceptance`` (draws, drafters); ``cost`` (draws): factor on the price of drafting; ``pairs``: facts behind it.
    ``engine`` (draws, drafters): factor on the speed-up by which an engine departs from its price, None for none.
    """

    acceptance: Floats
    cost: Floats
    pairs: int
    engine: Floats | None = None


def published_drafters(names: Sequence[str]) -> tuple[Drafter, ...]:
    """Give published shapes as drafters, smallest first; `CostError` for a name not known."""
    return tuple(sorted((Drafter(n, _shape(n)) for n in names), key=lambda d: d.parameters))


def made_drafters(layers: int, verifier: Drafter) -> tuple[Drafter, ...]:
    """Give made-up drafters of one depth for `verifier`, smallest first, one of each width."""
    whole, vocabulary = verifier.parameters, verifier.shape.vocabulary
    shapes = {s.hidden: s for s in (made_shape(share * whole, layers, vocabulary) for share in SHARES)}
    return tuple(Drafter(s.name, s) for _, s in sorted(shapes.items()))


def round_costs(
    verifier: str, place: Place, drafters: Sequence[Drafter], batch: int, settings: SizeSettings, host_s: float = 0.0
) -> Costs:
    """Price rounds of up to `settings.large_draft_tokens` drafted tokens; `host_s` is added to every draft step."""
    context = batch * settings.context_tokens
    verify = _verify(verifier, place)
    tokens = batch * np.arange(1, settings.large_draft_tokens + 2)
    verify_s = np.asarray(verify.step_seconds(np.full_like(tokens, batch), tokens, context), dtype=np.float64)
    draft_s = np.array([draft_step_s(d.shape, place, batch, context) for d in drafters]) + host_s
    return Costs(verify_s, draft_s)


def draft_step_s(shape: Shape, place: Place, batch: int, context: int) -> float:
    """Give the seconds of a draft step on one of the verifier's devices or on all, whichever is shorter."""
    found = []
    for size in {1, place.tensor_parallel}:
        try:
            found.append(float(_draft(shape, place, size).step_seconds(batch, batch, context)))
        except CostError:
            continue  # heads that do not divide: one device it is
    return min(found)


def cost_factors(draws: int, rng: Generator) -> tuple[Floats, float]:
    """Draw the error of drafting's price against verifying's, and give its standard deviation.

    The roofline's mean absolute error on decode steps of models that it was not fitted to, taken to be normal in the
    logarithm and independent for the two models.
    """
    deviation = Efficiencies.fitted().errors["decode_step_unfitted"] * _DEVIATION * 2**0.5
    return np.exp(rng.normal(0.0, deviation, draws)), float(deviation)


def drawn_speedups(costs: Costs, drawn: Drawn) -> tuple[Floats, Floats]:
    """Give speed-ups and draft lengths at the best length, shape (draws, drafters).

    Lengths are chosen by the prices. Whatever the engine, a round of such a length commits so many tokens and takes
    no less than a plain step: no speed-up exceeds the tokens of a round.
    """
    best, lengths = np.zeros(drawn.acceptance.shape), np.ones(drawn.acceptance.shape)
    draft_s = costs.draft_s * drawn.cost[:, None]
    for k, verify_s in enumerate(costs.verify_s.tolist()[1:], start=1):
        speed = tokens_per_round(drawn.acceptance, k) * costs.verify_s[0] / (verify_s + k * draft_s)
        better = speed > best
        best, lengths = np.where(better, speed, best), np.where(better, k, lengths)
    if drawn.engine is not None:
        best = np.minimum(best * drawn.engine, tokens_per_round(drawn.acceptance, lengths))
    return best, lengths


def large_curve(
    verifier: Drafter,
    place: Place,
    batch: int,
    drafters: Sequence[Drafter],
    costs: Costs,
    drawn: Drawn,
    latency: str,
    settings: SizeSettings,
) -> SizeCurve:
    """Give the curve of `drafters`, one column of `drawn` each; values are medians of draws."""
    speeds, lengths = drawn_speedups(costs, drawn)
    shares = np.array([d.parameters / verifier.parameters for d in drafters])
    points = tuple(
        SizePoint(
            drafter=d.name,
            parameters=d.parameters,
            share=number(shares[i]) or 0.0,
            layers=d.shape.layers,
            draft_tokens=int(np.median(lengths[:, i])),
            speedup=spread(speeds[:, i], drawn.pairs),
            draft_step_s=number(costs.draft_s[i]) or 0.0,
            cost_ratio=number(costs.ratio[i]) or 0.0,
            acceptance=spread(drawn.acceptance[:, i], drawn.pairs),
            share_in_all=number(shares[i]),
        )
        for i, d in enumerate(drafters)
    )
    spot = large_spot(shares, speeds, [d.name for d in drafters], drawn.pairs, settings)
    words = large_statement(verifier, place, batch, points, spot)
    return SizeCurve(
        verifier=verifier.name,
        device=place.name,
        label="extrapolated",
        latency=latency,
        batch=batch,
        domain=None,
        points=points,
        spot=spot,
        statement=words,
    )


def large_spot(shares: Floats, speeds: Floats, names: Sequence[str], pairs: int, settings: SizeSettings) -> SweetSpot:
    """Find the sweet spot in every draw.

    The speed-up is that of one size, the best by medians: whoever chooses does not know which draw is true.
    """
    spots = find_spots(shares, speeds, within=settings.within, gain=settings.gain)
    best_of, flat_of = shares_of(speeds, names, settings.within)
    top = spread(speeds[:, int(np.median(speeds, axis=0).argmax())], pairs)
    return SweetSpot(
        best=spread(spots.best, pairs),
        low=spread(spots.low, pairs),
        high=spread(spots.high, pairs),
        gain_end=spread(spots.gain_end, pairs),
        within=settings.within,
        gain=settings.gain,
        still_gaining=number(float(spots.gaining.mean())) or 0.0,
        best_of=best_of,
        flat_of=flat_of,
        may_be_best=likely_best(best_of),
        speedup=top,
        together=top,
        pays=(top.low or 0.0) > 1,
        costs=(top.high or 0.0) < 1,
    )


def large_statement(verifier: Drafter, place: Place, batch: int, points: Sequence[SizePoint], spot: SweetSpot) -> str:
    """Say which size is best and how sure that is, in parameters."""
    best, end = (scaled(each, verifier.parameters) for each in (spot.best, spot.gain_end))
    return (
        f"For {verifier.name} on {place.name} at batch {batch} the best drafter has "
        f"{parameters_interval(best)} parameters, {interval_text(spot.best)} of the verifier's; "
        f"{flat_words(points, spot)}; from {parameters_text(end.value)} on, doubling it gains less "
        f"than {spot.gain:.0%}. Its speed-up is {speedup_text(spot.speedup)} (extrapolated)."
    )


def spread(values: Floats, pairs: int) -> Estimate:
    """Give the median of draws and the interval that holds 95% of them; `pairs` facts are behind it."""
    tail = (1 - LEVEL) / 2
    low, middle, high = np.quantile(values, [tail, 0.5, 1 - tail])
    return Estimate(number(middle), number(low), number(high), pairs)


def _shape(name: str) -> Shape:
    try:
        return get_shape(name)
    except CalibrationError as fault:
        raise CostError(str(fault)) from None


def _verify(verifier: str, place: Place) -> RooflineStep:
    return roofline_step(verifier, place.device, dtype=place.dtype, tensor_parallel=place.tensor_parallel)


def _draft(shape: Shape, place: Place, size: int) -> RooflineStep:
    return roofline_step(shape, place.device, operation="draft", dtype=place.dtype, tensor_parallel=size)
