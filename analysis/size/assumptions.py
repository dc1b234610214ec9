"""What the best size depends on: views of what a draft step costs, and depth against width at equal parameters.

How far engines lie from what prices predict, as published checks tell, and what that leaves of a prediction.

A check is a speed-up that others measured beside the one predicted. The logarithms of measured over predicted are
taken to be normal about 0 with an unknown standard deviation: n checks estimate it with n degrees of freedom, so that
a prediction errs by Student's law, wide where checks are few. A pair not checked draws its own error; two drafters of
one verifier and engine share most of theirs where their sizes are close. What they share, no check here tells: the
distance in size at which errors part is stated, and other values of it are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.special import stdtrit

from analysis.common.bootstrap import LEVEL, number
from analysis.size.family import made_shape
from analysis.size.findings import DepthPoint, DepthStudy, Discrepancy, LatencyAssumption, SpeedCheck
from analysis.size.formula import best_lengths, break_even_rate, continuous_best_length, tokens_per_round
from analysis.size.large import Drafter, Drawn, drawn_speedups, round_costs, spread
from analysis.size.settings import Place, SizeSettings
from analysis.size.sweetspot import find_spots
from calibration.common.arrays import Floats

DEPTHS = (2, 4, 8, 16, 28, 40)
"""Layers of drafters of equal parameters."""


@dataclass(frozen=True)
class View:
    """One view of what a draft step costs: sizes in parameters (n), speed-ups and draft lengths (draws, n)."""

    name: str
    statement: str
    sizes: Floats
    speedups: Floats
    lengths: Floats
    pairs: int


def proportional(sizes: Floats, verifier: Drafter, drawn: Drawn) -> View:
    """Take the view of SDSL (arXiv 2603.11053): c = parameters over parameters, the draft length of Lambert's W.

    Verification takes as long as a plain step, whatever it verifies.
    """
    shares = sizes / verifier.parameters
    lengths = continuous_best_length(drawn.acceptance, shares)
    speeds = tokens_per_round(drawn.acceptance, lengths) / (lengths * shares + 1)
    statement = (
        "a draft step costs its share of parameters of a verifier step, any verification as much as a plain step; "
        "draft length by Lambert's W, as in SDSL"
    )
    return View("in proportion to parameters", statement, sizes, speeds, lengths, drawn.pairs)


def by_roofline(
    name: str,
    statement: str,
    verifier: Drafter,
    place: Place,
    drafters: Sequence[Drafter],
    drawn: Drawn,
    settings: SizeSettings,
    host_s: float = 0.0,
) -> View:
    """Price drafting from depth, bytes and launches, and `host_s` a draft step, at batch 1."""
    costs = round_costs(verifier.name, place, drafters, 1, settings, host_s)
    speeds, lengths = drawn_speedups(costs, drawn)
    return View(name, statement, np.array([d.parameters for d in drafters]), speeds, lengths, drawn.pairs)


def summarise(view: View, against: View, verifier: Drafter, settings: SizeSettings) -> LatencyAssumption:
    """Give the sweet spot under `view`, and how far it lies from that under `against` on the same draws."""
    spots = find_spots(view.sizes, view.speedups, within=settings.within, gain=settings.gain)
    other = find_spots(against.sizes, against.speedups, within=settings.within, gain=settings.gain)
    best = spread(spots.best, view.pairs)
    at = int(np.abs(np.log(view.sizes / (best.value or view.sizes[0]))).argmin())
    return LatencyAssumption(
        view.name,
        view.statement,
        best,
        spread(spots.low, view.pairs),
        spread(spots.high, view.pairs),
        spread(verifier.parameters / spots.best, view.pairs),
        spread(spots.best / other.best, view.pairs),
        number(float((spots.best > other.best).mean())) or 0.0,
        float(f"{np.median(view.lengths[:, at]):.3g}"),
        spread(view.speedups.max(axis=1), view.pairs),
    )


def study_depth(
    verifier: Drafter, place: Place, parameters: float, batch: int, drawn: Drawn, settings: SizeSettings
) -> DepthStudy:
    """Compare depths at equal parameters; `drawn` has one column, the acceptance at that size."""
    drafters = tuple(
        Drafter(f"{layers} layers", made_shape(parameters, layers, verifier.shape.vocabulary)) for layers in DEPTHS
    )
    costs = round_costs(verifier.name, place, drafters, batch, settings)
    same = Drawn(np.repeat(drawn.acceptance, len(drafters), axis=1), drawn.cost, drawn.pairs)
    speeds, _ = drawn_speedups(costs, same)
    rate = float(np.median(drawn.acceptance))
    target = float(best_lengths(np.full(len(drafters), rate), costs.seconds)[0][0])
    points = []
    for i, drafter in enumerate(drafters):
        needed = break_even_rate(target, costs.seconds[i])
        points.append(
            DepthPoint(
                drafter.shape.layers,
                drafter.shape.hidden,
                drafter.parameters,
                number(costs.draft_s[i]) or 0.0,
                number(costs.ratio[i]) or 0.0,
                spread(speeds[:, i], drawn.pairs),
                number(needed),
                None if needed is None else number(round(needed - rate, 6) + 0.0),
            )
        )
    return DepthStudy(verifier.name, place.name, batch, parameters, number(rate) or 0.0, tuple(points))


_MOST = 50.0
"""Errors are cut at a factor of exp(50): that far out only the side counts."""


def discrepancy(checks: Sequence[SpeedCheck]) -> Discrepancy:
    """Estimate the error of a prediction from `checks`; without any, it is not known and left out."""
    if not checks:
        return Discrepancy(0, None, None, None)
    errors = np.array([check.log_error for check in checks])
    scale = float(np.sqrt((errors**2).mean()))
    reach = float(stdtrit(len(errors), (1 + LEVEL) / 2)) * scale
    largest = checks[int(np.abs(errors).argmax())]
    return Discrepancy(len(errors), number(scale), number(float(np.exp(min(reach, _MOST)))), largest)


def error_factors(found: Discrepancy, parameters: Floats, doublings: float, draws: int, rng: Generator) -> Floats:
    """Draw factors on the predicted speed-ups of drafters of so many `parameters`, shape (draws, n).

    Each factor's logarithm follows Student's law with as many degrees of freedom as there are checks, times their
    root mean square. Within a draw the errors of two sizes d doublings apart correlate with
    exp(-(d / doublings)^2 / 2); infinite `doublings`: one error for all sizes.
    """
    if found.log_error is None:
        return np.ones((draws, len(parameters)))
    apart = np.subtract.outer(np.log2(parameters), np.log2(parameters)) / doublings
    alike = np.exp(-(apart**2) / 2) + 1e-6 * np.eye(len(parameters))
    normal = rng.normal(size=(draws, len(parameters))) @ np.linalg.cholesky(alike).T
    scale = found.log_error * np.sqrt(found.checks / rng.chisquare(found.checks, size=draws))
    return np.asarray(np.exp(np.clip(scale[:, None] * normal, -_MOST, _MOST)))
