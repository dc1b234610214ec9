"""The extrapolation to a verifier of 70B: public facts, curves, what they depend on, and published speed-ups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.random import Generator

from analysis.bootstrap import Estimate, number
from analysis.size.assumptions import by_roofline, proportional, study_depth, summarise
from analysis.size.facts import ANCHORS, FAMILIES, OPTIMA, SPEEDUPS, UNPLACED, MeasuredSpeedup, SizedPair
from analysis.size.findings import (
    DepthStudy,
    Extrapolation,
    LatencyAssumption,
    Optimum,
    PairFact,
    SizeCurve,
    SpeedCheck,
)
from analysis.size.formula import Floats
from analysis.size.large import (
    Drafter,
    Drawn,
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
from analysis.size.sweetspot import find_spots
from simulator.pricing.kernels import Efficiencies

EQUAL_PARAMETERS = 0.8e9
"""Size at which depth is compared with width: about that of the best drafter of Decoding Speculative Decoding."""

PUBLISHED_DEPTH = "roofline of published shapes"


class _Draws:
    """Acceptance by size, drawn once for every size that is asked for, so that all curves share their draws."""

    def __init__(
        self,
        laws: Mapping[str, Sequence[LawCurves]],
        whole: float,
        groups: Mapping[str, Floats],
        settings: SizeSettings,
        rng: Generator,
    ) -> None:
        shares = np.concatenate(list(groups.values())) / whole
        rates, self.anchor = acceptance_draws(laws, ANCHORS, shares, settings.draws, rng)
        self.cost, self.cost_error = cost_factors(settings.draws, rng)
        ends = np.cumsum([len(sizes) for sizes in groups.values()])
        self._rates = dict(zip(groups, np.split(rates, ends[:-1], axis=1), strict=True))
        self._pairs = len(FAMILIES) + len(ANCHORS)

    def of(self, group: str) -> Drawn:
        """Give the draws for one group of sizes."""
        return Drawn(self._rates[group], self.cost, self._pairs)


def extrapolate(own: OwnLaw, settings: SizeSettings, rng: Generator) -> Extrapolation:
    """Extrapolate to `settings.verifier`; `own`: the law of the measured family, as good as a public one's.

    Raises `CostError` for shapes and devices that are not known.
    """
    (verifier,) = published_drafters([settings.verifier])
    existing = published_drafters(settings.published)
    made = {
        "usual": made_drafters(settings.depth_layers, verifier),
        "shallow": made_drafters(settings.shallow_layers, verifier),
    }
    checked = published_drafters([check.drafter for check in SPEEDUPS])
    groups = {
        "published": np.array([d.parameters for d in existing]),
        **{name: np.array([d.parameters for d in each]) for name, each in made.items()},
        "equal": np.array([EQUAL_PARAMETERS]),
        "checked": np.array([d.parameters for d in checked]),
    }
    laws = public_laws(rng)
    # A family with no size below the anchors' does not tell how acceptance falls there.
    reaches = min(p.share for p in own.pairs) < min(a.share for a in ANCHORS)
    if reaches:
        laws[own.verifier] = own.laws
    draws = _Draws(laws, verifier.parameters, groups, settings, rng)
    first = settings.places[0]
    scale = tuple(_curves(verifier, made["usual"], draws.of("usual"), _depth_words(settings), settings))
    return Extrapolation(
        verifier.name,
        verifier.parameters,
        _pair_facts(),
        tuple(sorted(laws)),
        f"{len(FAMILIES) + len(ANCHORS)} published pairs{' and the measured family' if reaches else ''}",
        check_bands(laws, (*FAMILIES, *(own.pairs if reaches else ())), settings.draws, rng),
        tuple(_curves(verifier, existing, draws.of("published"), PUBLISHED_DEPTH, settings)),
        scale,
        _by_anchor(verifier, made["usual"], draws, settings),
        _assumptions(verifier, first, made, draws, settings),
        _depths(verifier, first, draws.of("equal"), settings),
        tuple(_check(each, verifier, checked, draws.of("checked"), settings) for each in SPEEDUPS),
        {f"{fact.drafter} for {fact.verifier}": number(fact.least_rate) or 0.0 for fact in UNPLACED},
        settings.context_tokens,
        number(draws.cost_error) or 0.0,
        settings.depth_layers,
    )


def published_optima() -> tuple[Optimum, ...]:
    """Give the optima that others published."""
    return tuple(
        Optimum(
            o.source, o.verifier, o.drafter, number(o.share) or 0.0, round(1 / o.share), o.among, o.latency, o.read
        )
        for o in OPTIMA
    )


def _curves(
    verifier: Drafter, drafters: Sequence[Drafter], drawn: Drawn, latency: str, settings: SizeSettings
) -> Iterator[SizeCurve]:
    for place in settings.places:
        for batch in settings.large_batches:
            costs = round_costs(verifier.name, place, drafters, batch, settings)
            yield large_curve(verifier, place, batch, drafters, costs, drawn, latency, settings)


def _by_anchor(
    verifier: Drafter, drafters: Sequence[Drafter], draws: _Draws, settings: SizeSettings
) -> dict[str, Estimate]:
    costs = round_costs(verifier.name, settings.places[0], drafters, 1, settings)
    speeds, _ = drawn_speedups(costs, draws.of("usual"))
    best = find_spots(np.array([d.parameters for d in drafters]), speeds).best
    return {
        f"{a.verifier} with {a.drafter}, {a.task}": spread(best[draws.anchor == i], len(FAMILIES) + 1)
        for i, a in enumerate(ANCHORS)
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
        by_roofline(name, statement, verifier, place, made[group], draws.of(group), settings, host)
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
        fact.source,
        fact.drafter,
        fact.speedup,
        spread(predicted, drawn.pairs),
        number(plain) or 0.0,
        number(draft_s) or 0.0,
        implied,
        fact.read,
    )


def _depth_words(settings: SizeSettings) -> str:
    return f"roofline of made-up shapes, {settings.depth_layers} layers each"


def _pair_facts() -> tuple[PairFact, ...]:
    def fact(role: str, pair: SizedPair) -> PairFact:
        share, rate = number(pair.share) or 0.0, number(pair.acceptance) or 0.0
        return PairFact(role, pair.verifier, pair.drafter, pair.task, share, rate, pair.source, pair.read)

    return (*(fact("family", p) for p in FAMILIES), *(fact("anchor", p) for p in ANCHORS))
