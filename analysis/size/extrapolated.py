"""The extrapolation to a verifier of 70B: public facts, curves, what they depend on, and published speed-ups.

What the best size depends on: views of what a draft step costs, and depth against width at equal parameters.

How far engines lie from what prices predict, as published checks tell, and what that leaves of a prediction.

A check is a speed-up that others measured beside the one predicted. The logarithms of measured over predicted are
taken to be normal about 0 with an unknown standard deviation: n checks estimate it with n degrees of freedom, so that
a prediction errs by Student's law, wide where checks are few. A pair not checked draws its own error; two drafters of
one verifier and engine share most of theirs where their sizes are close. What they share, no check here tells: the
distance in size at which errors part is stated, and other values of it are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from scipy.special import stdtrit

from analysis.common.bootstrap import LEVEL, Estimate, number
from analysis.size.facts import (
    OPTIMA,
    Facts,
    MeasuredSpeedup,
    SizedPair,
    best_lengths,
    break_even_rate,
    continuous_best_length,
    tokens_per_round,
)
from analysis.size.findings import (
    DepthPoint,
    DepthStudy,
    Discrepancy,
    Extrapolation,
    LatencyAssumption,
    Optimum,
    PairFact,
    Sensitivity,
    SizeCurve,
    SpeedCheck,
    most_often,
    scaled,
)
from analysis.size.large import (
    Drafter,
    Drawn,
    competing,
    cost_factors,
    drawn_speedups,
    large_curve,
    made_drafters,
    published_drafters,
    round_costs,
    spread,
)
from analysis.size.law import LawCurves, acceptance_draws, check_bands, public_laws
from analysis.size.measured import OwnLaw
from analysis.size.settings import Place, SizeSettings
from analysis.size.sweetspot import find_spots, made_shape
from calibration.common.arrays import Floats
from simulator.hardware.work import Efficiencies

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
        name=view.name,
        statement=view.statement,
        best=best,
        low=spread(spots.low, view.pairs),
        high=spread(spots.high, view.pairs),
        divisor=spread(verifier.parameters / spots.best, view.pairs),
        shift=spread(spots.best / other.best, view.pairs),
        larger=number(float((spots.best > other.best).mean())) or 0.0,
        draft_tokens=float(f"{np.median(view.lengths[:, at]):.3g}"),
        speedup=spread(view.speedups.max(axis=1), view.pairs),
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
                layers=drafter.shape.layers,
                hidden=drafter.shape.hidden,
                parameters=drafter.parameters,
                draft_step_s=number(costs.draft_s[i]) or 0.0,
                cost_ratio=number(costs.ratio[i]) or 0.0,
                speedup=spread(speeds[:, i], drawn.pairs),
                break_even_rate=number(needed),
                rate_needed=None if needed is None else number(round(needed - rate, 6) + 0.0),
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


EQUAL_PARAMETERS = 0.8e9
"""Size at which depth is compared with width: about that of the best drafter of Decoding Speculative Decoding."""

PUBLISHED_DEPTH = "roofline of published shapes"


class _Draws:
    """Acceptance by size, drawn once for every size that is asked for, so that all curves share their draws."""

    def __init__(
        self,
        laws: Mapping[str, Sequence[LawCurves]],
        facts: Facts,
        whole: float,
        groups: Mapping[str, Floats],
        settings: SizeSettings,
        rng: Generator,
    ) -> None:
        self._sizes = np.concatenate(list(groups.values()))
        quoted = {pair.verifier for pair in facts.families if pair.read == "quoted"}
        rates, self.anchor = acceptance_draws(
            laws,
            facts.anchors,
            self._sizes / whole,
            settings.draws,
            rng,
            quoted=quoted,
            weight=settings.quoted_weight,
        )
        self.cost, self.cost_error = cost_factors(settings.draws, rng)
        self._ends = np.cumsum([len(sizes) for sizes in groups.values()])[:-1]
        self._rates = dict(zip(groups, np.split(rates, self._ends, axis=1), strict=True))
        self._engine: dict[str, Floats] = {}
        self._pairs = len(facts.families) + len(facts.anchors)

    def of(self, group: str) -> Drawn:
        """Give the draws for one group of sizes, engines as they are priced."""
        return Drawn(self._rates[group], self.cost, self._pairs)

    def with_engines(self, found: Discrepancy, doublings: float, rng: Generator) -> Mapping[str, Drawn]:
        """Give the draws of every group with an engine's error, drawn for all sizes together."""
        sizes, place = np.unique(self._sizes, return_inverse=True)
        factors = error_factors(found, sizes, doublings, len(self.cost), rng)[:, place]
        each = dict(zip(self._rates, np.split(factors, self._ends, axis=1), strict=True))
        return {group: replace(self.of(group), engine=each[group]) for group in self._rates}


@dataclass(frozen=True)
class _Field:
    """What competes for the large verifier: existing and made-up drafters, and the sizes that are drawn for them."""

    verifier: Drafter
    existing: tuple[Drafter, ...]
    made: Mapping[str, tuple[Drafter, ...]]
    groups: Mapping[str, Floats]


def extrapolate(own: OwnLaw, settings: SizeSettings, rng: Generator, facts: Facts | None = None) -> Extrapolation:
    """Extrapolate to `settings.verifier`; `own`: the law of the measured family, as good as a public one's.

    `facts`: by default the public ones of `analysis.size.facts`. Raises `CostError` for shapes and devices that are
    not known.
    """
    facts = Facts() if facts is None else facts
    (verifier,) = published_drafters([settings.verifier])
    existing, excluded = competing(verifier, published_drafters(settings.published))
    made = {
        "usual": made_drafters(settings.depth_layers, verifier),
        "shallow": made_drafters(settings.shallow_layers, verifier),
    }
    checked = published_drafters([check.drafter for check in facts.speedups])
    groups = {
        "published": np.array([d.parameters for d in existing]),
        **{name: np.array([d.parameters for d in each]) for name, each in made.items()},
        "equal": np.array([EQUAL_PARAMETERS]),
        "checked": np.array([d.parameters for d in checked]),
    }
    field = _Field(verifier, existing, made, groups)
    laws = public_laws(rng, facts.families)
    # A family with no size below the anchors' does not tell how acceptance falls there.
    reaches = min(p.share for p in own.pairs) < min(a.share for a in facts.anchors)
    if reaches:
        laws[own.verifier] = own.laws
    draws = _Draws(laws, facts, verifier.parameters, groups, settings, rng)
    first = settings.places[0]
    checks = tuple(_check(each, verifier, checked, draws.of("checked"), settings) for each in facts.speedups)
    found = discrepancy(checks)
    engines = draws.with_engines(found, settings.shared_doublings, rng)
    words = _depth_words(settings)
    public = len(facts.families) + len(facts.anchors)
    return Extrapolation(
        verifier=verifier.name,
        verifier_parameters=verifier.parameters,
        pairs=_pair_facts(facts),
        families=tuple(sorted(laws)),
        behind=f"{public} published pairs{' and the measured family' if reaches else ''}",
        band_checks=check_bands(laws, (*facts.families, *(own.pairs if reaches else ())), settings.draws, rng),
        published=tuple(_curves(verifier, existing, engines["published"], PUBLISHED_DEPTH, settings))
        if existing
        else (),
        excluded=excluded,
        scale=tuple(_curves(verifier, made["usual"], engines["usual"], words, settings)),
        priced=tuple(_curves(verifier, made["usual"], draws.of("usual"), f"{words}, prices alone", settings)),
        discrepancy=found,
        sensitivity=_sensitivity(field, laws, facts, found, settings),
        quoted_weight=settings.quoted_weight,
        by_anchor=_by_anchor(verifier, made["usual"], draws, facts, settings),
        assumptions=_assumptions(verifier, first, made, draws, settings),
        depth=_depths(verifier, first, draws.of("equal"), settings),
        checks=checks,
        least_rates={
            f"{fact.drafter} for {fact.verifier}": number(fact.least_rate) or 0.0 for fact in facts.unplaced
        },
        context_tokens=settings.context_tokens,
        cost_error=number(draws.cost_error) or 0.0,
        depth_layers=settings.depth_layers,
    )


def _sensitivity(
    field: _Field,
    laws: Mapping[str, Sequence[LawCurves]],
    facts: Facts,
    found: Discrepancy,
    settings: SizeSettings,
) -> tuple[Sensitivity, ...]:
    """Answer again under other assumptions: one about engines or about quoted facts at a time, on the same seeds."""
    one = replace(settings, places=settings.places[:1], large_batches=settings.large_batches[:1])
    none = Discrepancy(0, None, None, None)
    cases = [
        ("as reported, drawn anew", found, one),
        ("prices alone: every engine is as priced", none, one),
        ("an engine errs alike at all sizes", found, replace(one, shared_doublings=np.inf)),
        ("an engine's error parts within a doubling of size", found, replace(one, shared_doublings=1.0)),
    ]
    quoted = {pair.verifier for pair in facts.families if pair.read == "quoted"}
    at_hand = set(laws) - quoted and any(anchor.read == "file" for anchor in facts.anchors)
    if quoted and at_hand:
        cases += [
            (
                f"quoted families weigh {weight:g} (reported: {one.quoted_weight:g})",
                found,
                replace(one, quoted_weight=weight),
            )
            for weight in (0.0, 1.0)
            if weight != one.quoted_weight
        ]
    return tuple(_answered(name, field, laws, facts, error, chosen) for name, error, chosen in cases)


def _answered(
    assumption: str,
    field: _Field,
    laws: Mapping[str, Sequence[LawCurves]],
    facts: Facts,
    found: Discrepancy,
    settings: SizeSettings,
) -> Sensitivity:
    rng = np.random.default_rng([settings.seed, 3])
    draws = _Draws(laws, facts, field.verifier.parameters, field.groups, settings, rng)
    engines = draws.with_engines(found, settings.shared_doublings, rng)
    (scale,) = _curves(field.verifier, field.made["usual"], engines["usual"], "", settings)
    best = scaled(scale.spot.best, field.verifier.parameters)
    favourite = share = None
    if field.existing:
        (curve,) = _curves(field.verifier, field.existing, engines["published"], "", settings)
        favourite, share = most_often(curve.spot)
    return Sensitivity(assumption, best, scale.spot.speedup, favourite, share)


def published_optima() -> tuple[Optimum, ...]:
    """Give the optima that others published."""
    return tuple(
        Optimum(
            source=o.source,
            verifier=o.verifier,
            drafter=o.drafter,
            share=number(o.share) or 0.0,
            divisor=round(1 / o.share),
            among=o.among,
            latency=o.latency,
            read=o.read,
        )
        for o in OPTIMA
    )


def _curves(
    verifier: Drafter, drafters: Sequence[Drafter], drawn: Drawn, latency: str, settings: SizeSettings
) -> Iterator[SizeCurve]:
    for place in settings.places:
        for batch in settings.large_batches:
            costs = round_costs(verifier.name, place, drafters, batch, settings)
            yield large_curve(
                verifier=verifier,
                place=place,
                batch=batch,
                drafters=drafters,
                costs=costs,
                drawn=drawn,
                latency=latency,
                settings=settings,
            )


def _by_anchor(
    verifier: Drafter, drafters: Sequence[Drafter], draws: _Draws, facts: Facts, settings: SizeSettings
) -> dict[str, Estimate]:
    costs = round_costs(verifier.name, settings.places[0], drafters, 1, settings)
    speeds, _ = drawn_speedups(costs, draws.of("usual"))
    best = find_spots(np.array([d.parameters for d in drafters]), speeds).best
    return {
        f"{a.verifier} with {a.drafter}, {a.task}": spread(best[draws.anchor == i], len(facts.families) + 1)
        for i, a in enumerate(facts.anchors)
        if (draws.anchor == i).any()
    }


def _assumptions(
    verifier: Drafter,
    place: Place,
    made: Mapping[str, Sequence[Drafter]],
    draws: _Draws,
    settings: SizeSettings,
) -> tuple[LatencyAssumption, ...]:
    """Give the best sizes under every view of latency, the first in proportion to parameters."""
    deep, wide = settings.depth_layers, settings.shallow_layers
    host_s = Efficiencies.fitted().host_s
    sizes = np.array([d.parameters for d in made["usual"]])
    views = (
        (
            "shallow",
            f"wide and shallow: {wide} layers",
            f"roofline; every size has {wide} layers",
            0.0,
        ),
        (
            "usual",
            f"usual depth: {deep} layers",
            f"roofline; every size has {deep} layers, about as published models from 0.5B to 8B",
            0.0,
        ),
        (
            "usual",
            f"usual depth and {1e3 * host_s:.2f} ms of host a step",
            "the same, and each draft step waits for the host as a plain step does",
            host_s,
        ),
    )
    first = proportional(sizes, verifier, draws.of("usual"))
    rest = (
        by_roofline(
            name=name,
            statement=statement,
            verifier=verifier,
            place=place,
            drafters=made[group],
            drawn=draws.of(group),
            settings=settings,
            host_s=host,
        )
        for group, name, statement, host in views
    )
    return tuple(summarise(view, first, verifier, settings) for view in (first, *rest))


def _depths(verifier: Drafter, place: Place, drawn: Drawn, settings: SizeSettings) -> tuple[DepthStudy, ...]:
    return tuple(
        study_depth(verifier, place, EQUAL_PARAMETERS, batch, drawn, settings) for batch in settings.large_batches
    )


def _check(
    fact: MeasuredSpeedup, verifier: Drafter, drafters: Sequence[Drafter], drawn: Drawn, settings: SizeSettings
) -> SpeedCheck:
    index = next(i for i, d in enumerate(drafters) if d.name == fact.drafter)
    place = Place(fact.device, fact.tensor_parallel, fact.dtype)
    costs = round_costs(fact.verifier, place, [drafters[index]], 1, settings)
    plain, draft_s = float(costs.verify_s[0]), float(costs.draft_s[0])
    implied = None
    if fact.draft_tokens is None or fact.tokens is None:
        mine = Drawn(drawn.acceptance[:, index : index + 1], drawn.cost, drawn.pairs)
        predicted = drawn_speedups(costs, mine)[0][:, 0]
    else:
        k, verify_s = fact.draft_tokens, float(costs.verify_s[fact.draft_tokens])
        predicted = fact.tokens * plain / (verify_s + k * draft_s * drawn.cost)
        implied = number((fact.tokens * plain / fact.speedup - verify_s) / k)
    return SpeedCheck(
        source=fact.source,
        drafter=fact.drafter,
        published=fact.speedup,
        predicted=spread(predicted, drawn.pairs),
        plain_step_s=number(plain) or 0.0,
        predicted_draft_s=number(draft_s) or 0.0,
        implied_draft_s=implied,
        read=fact.read,
    )


def _depth_words(settings: SizeSettings) -> str:
    return f"roofline of made-up shapes, {settings.depth_layers} layers each"


def _pair_facts(facts: Facts) -> tuple[PairFact, ...]:
    def fact(role: str, pair: SizedPair) -> PairFact:
        share, rate = number(pair.share) or 0.0, number(pair.acceptance) or 0.0
        return PairFact(
            role=role,
            verifier=pair.verifier,
            drafter=pair.drafter,
            task=pair.task,
            share=share,
            acceptance=rate,
            source=pair.source,
            read=pair.read,
        )

    return (*(fact("family", p) for p in facts.families), *(fact("anchor", p) for p in facts.anchors))
