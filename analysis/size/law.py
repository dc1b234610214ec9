"""How acceptance grows with the drafter: laws fitted to families by size, carried over to a pair that has one size.

No public family has a 70B verifier at several drafter sizes, so its curve is a *scenario*: pinned to the acceptance
of a public pair of that size (an anchor), and bent as a family bends that was measured at several sizes. A draw takes
one verifier with a measured family, one of its families, one form fitted to it, one way to carry it over and one
anchor; families quoted from a paper weigh less than those at hand. The spread of the draws is what these facts leave
open: a band for a pair not seen, not the error of a mean.

Two ways to carry over, which no fact here can tell apart: the odds of acceptance change by the family's factor, or
the misses (1 - acceptance) do. Both leave the anchor as it is, so the band is narrowest there and widens away from
it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from analysis.common.bootstrap import LEVEL, Estimate, number
from analysis.laws import FittedForm, compare_forms, fit_form
from analysis.size.facts import FAMILIES, SizedPair
from analysis.size.findings import BandCheck
from calibration.common.arrays import Floats
from calibration.common.errors import ConvergenceWarning, ReplayError

TWO_PARAMETERS = ("log-linear", "power", "logit")
"""Forms that three sizes can be fitted with; none of these can be told from another by three sizes."""

ALL_FORMS = (*TWO_PARAMETERS, "saturating")
CARRIED = ("odds", "misses")
ROUNDING = 0.005
"""Published acceptances have two decimals: each refit moves them within half a unit of the last."""

_REFITS = 8
_EDGE = 1e-3


@dataclass(frozen=True)
class LawCurves:
    """Refits of one form to one family: acceptance against the share of parameters."""

    family: str
    form: str
    curves: tuple[FittedForm, ...]


def public_laws(rng: Generator, pairs: Sequence[SizedPair] = FAMILIES) -> dict[str, tuple[LawCurves, ...]]:
    """Fit every form that three sizes allow to every public family; by verifier."""
    families: dict[str, list[SizedPair]] = {}
    for pair in pairs:
        families.setdefault(pair.family, []).append(pair)
    laws: dict[str, list[LawCurves]] = {}
    for name, members in families.items():
        shares = np.array([p.share for p in members])
        rates = np.array([p.acceptance for p in members])
        jitter = rng.uniform(-ROUNDING, ROUNDING, size=(_REFITS, len(rates)))
        refits = np.vstack([rates, np.clip(rates + jitter, _EDGE, 1 - _EDGE)])
        laws.setdefault(members[0].verifier, []).extend(_fitted(name, TWO_PARAMETERS, shares, refits))
    return {verifier: tuple(found) for verifier, found in laws.items()}


def measured_laws(
    family: str, shares: Floats, rates: Floats, replicates: Floats
) -> tuple[tuple[LawCurves, ...], str]:
    """Fit the forms that a measured family cannot tell apart, and say which.

    `replicates` (draws, sizes) are refitted. With too few sizes to compare forms, all of two parameters are kept.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ranking = compare_forms(shares, rates, ALL_FORMS, scale=1.0).interpolation
    forms = TWO_PARAMETERS if ranking.best is None else (ranking.best, *ranking.alike)
    return _fitted(family, forms, shares, np.vstack([rates, replicates])), ranking.statement


def acceptance_draws(
    laws: Mapping[str, Sequence[LawCurves]],
    anchors: Sequence[SizedPair],
    shares: Floats,
    draws: int,
    rng: Generator,
    *,
    quoted: Collection[str] = (),
    weight: float = 1.0,
) -> tuple[Floats, NDArray[np.int64]]:
    """Draw acceptance curves over `shares`, shape (draws, shares), and the anchor of each (index into `anchors`).

    See the module for what a draw is; each family, form and way is as likely as another, and so is each verifier and
    anchor, but that the verifiers `quoted` and the anchors that are quoted have `weight` where others have 1. Raises
    `ReplayError` where nothing has any weight.
    """
    verifiers = sorted(laws)
    likely = _chances([weight if name in quoted else 1.0 for name in verifiers], "families")
    found = np.empty((draws, len(shares)))
    pinned = _chances([weight if a.read == "quoted" else 1.0 for a in anchors], "anchors")
    chosen = rng.choice(len(anchors), size=draws, p=pinned)
    owners = rng.choice(len(verifiers), size=draws, p=likely)
    cache: dict[tuple[int, int], tuple[Floats, Floats]] = {}
    for row in range(draws):
        own = laws[verifiers[owners[row]]]
        families = sorted({law.family for law in own})
        family = families[rng.integers(len(families))]
        forms = [law for law in own if law.family == family]
        law = forms[rng.integers(len(forms))]
        curve = law.curves[rng.integers(len(law.curves))]
        way, anchor = CARRIED[rng.integers(len(CARRIED))], anchors[chosen[row]]
        key = (id(curve), int(chosen[row]))
        if key not in cache:
            cache[key] = (curve_values(curve, shares), curve_values(curve, np.array([anchor.share])))
        found[row] = carried_over(*cache[key], anchor.acceptance, way)
    return found, chosen


def _chances(weights: Sequence[float], what: str) -> Floats:
    """Weights as chances."""
    total = sum(weights)
    if not total > 0:
        raise ReplayError(f"size study: {what}: one must have a weight above 0, got {len(weights)} without")
    return np.array(weights) / total


def check_bands(
    laws: Mapping[str, Sequence[LawCurves]], pairs: Sequence[SizedPair], draws: int, rng: Generator
) -> tuple[BandCheck, ...]:
    """Predict the smallest drafter of every family in `pairs` from its largest and the laws of all other verifiers.

    What the bands are worth, on families whose answer is known; they share verifiers, so they are not independent.
    """
    families: dict[str, list[SizedPair]] = {}
    for pair in pairs:
        families.setdefault(pair.family, []).append(pair)
    found = []
    for name, members in families.items():
        members.sort(key=lambda p: p.share)
        small, anchor = members[0], members[-1]
        others = {verifier: own for verifier, own in laws.items() if verifier != anchor.verifier}
        if not others:
            continue
        rates, _ = acceptance_draws(others, [anchor], np.array([small.share]), draws, rng)
        low, middle, high = (number(v) for v in np.quantile(rates, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2]))
        behind = len({law.family for own in others.values() for law in own})
        predicted = Estimate(middle, low, high, behind)
        shares = (number(anchor.share) or 0.0, number(small.share) or 0.0)
        found.append(BandCheck(name, *shares, number(small.acceptance) or 0.0, predicted))
    return tuple(found)


def carried_over(curve: Floats, at_anchor: Floats, acceptance: float, way: str) -> Floats:
    """Bend a pair with `acceptance` at the anchor as `curve` bends about its value `at_anchor`; see the module."""
    if way == "misses":
        return np.clip(1 - (1 - acceptance) * (1 - curve) / (1 - at_anchor), _EDGE, 1 - _EDGE)
    odds = acceptance / (1 - acceptance) * (curve / (1 - curve)) / (at_anchor / (1 - at_anchor))
    return np.asarray(odds / (1 + odds))


def curve_values(curve: FittedForm, shares: Floats) -> Floats:
    """Give the acceptance of a fitted form, kept between 0.001 and 0.999, which some forms leave."""
    return np.clip(curve.predict(shares), _EDGE, 1 - _EDGE)


def _fitted(family: str, forms: Sequence[str], shares: Floats, refits: Floats) -> tuple[LawCurves, ...]:
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a form at the edge of itself still draws a curve
        for form in forms:
            curves = [fit_form(form, shares, rates, scale=1.0 if form == "logit" else None) for rates in refits]
            found.append(LawCurves(family, form, tuple(curves)))
    return tuple(found)
