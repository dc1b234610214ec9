"""The size curve of a recorded family: recorded acceptance, and step times as recorded or of a catalogued device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from analysis.common.bootstrap import LEVEL, ClusterBootstrap, Estimate, number
from analysis.size.facts import SizedPair
from analysis.size.findings import LatencyLine, MeasuredFamily, SizeCurve, SizePoint, SweetSpot, spot_statement
from analysis.size.law import LawCurves, measured_laws
from analysis.size.settings import (
    PROPORTIONAL,
    ROOFLINE,
    Drafted,
    Prices,
    Requests,
    Share,
    SizeSettings,
    drafted_seconds,
    extrapolated,
    plain_seconds,
    played,
    priced,
    round_seconds,
)
from analysis.size.sweetspot import Judged, Student, family_by_size, find_spots, judge_sizes, shares_of
from calibration.common.arrays import Floats
from calibration.traces import TraceSet

_REFITTED = 40
"""Bootstrap replicates of the family's acceptance that the forms are refitted to."""


@dataclass(frozen=True)
class OwnLaw:
    """How acceptance grows in the measured family: its laws, and its drafters as pairs."""

    verifier: str
    laws: tuple[LawCurves, ...]
    pairs: tuple[SizedPair, ...]


@dataclass(frozen=True)
class _Family:
    """What every curve of a family shares."""

    verifier: str
    students: tuple[Student, ...]
    requests: Requests
    drafted: tuple[Drafted, ...]
    bootstrap: ClusterBootstrap
    settings: SizeSettings

    @property
    def shares(self) -> Floats:
        return np.array([s.share for s in self.students])


@dataclass(frozen=True)
class _Timed:
    """Seconds of every request at one batch size of one device: without speculation, and by size and draft length."""

    device: str
    label: str
    latency: str
    prices: Prices
    batch: int
    plain: Floats
    seconds: Floats


def study_family(traces: TraceSet, settings: SizeSettings, rng: Generator) -> tuple[MeasuredFamily, OwnLaw]:
    """Study the family of `traces`; give the findings and the laws of its acceptance, for the extrapolation.

    Raises `ReplayError` where there is no family, `CostError` where neither timings nor a catalogued device price it.
    """
    students = family_by_size(traces, settings.drafters)
    requests = Requests.of(traces)
    drafted = tuple(played(traces, s.name, settings.draft_tokens) for s in students)
    bootstrap = ClusterBootstrap(requests.domains, rng, draws=settings.draws)
    family = _Family(traces.manifest.verifier.name, students, requests, drafted, bootstrap, settings)
    timed: list[_Timed] = []
    assumed: list[_Timed] = []
    latency: list[LatencyLine] = []
    for device, prices, latency_of in priced(traces, students, settings.catalogue):
        for batch in settings.batches:
            label = "extrapolated" if _untested(family, prices, batch) or latency_of == ROOFLINE else "simulated"
            timed.append(_timed(family, device, label, latency_of, prices, batch))
            assumed.append(_timed(family, device, "assumed", PROPORTIONAL, prices, batch))
            latency += _latency_line(family, device, prices, batch)
    curves = _curves(family, timed, (None, *bootstrap.domains))
    proportional = _curves(family, assumed, (None,))
    rates, replicates = _acceptance(family)
    laws, said = measured_laws(family.verifier, family.shares, rates, replicates[:_REFITTED])
    found = MeasuredFamily(
        verifier=family.verifier,
        requests=len(requests.domains),
        domains=bootstrap.domains,
        curves=tuple(curves),
        proportional=tuple(proportional),
        latency=tuple(latency),
        law=said,
    )
    # Sizes stand for shares alone here: the verifier counts as 1.
    pairs = tuple(
        SizedPair(
            verifier=family.verifier,
            drafter=s.name,
            verifier_parameters=1.0,
            drafter_parameters=s.share,
            task="recorded",
            acceptance=float(rate),
            source="recorded here",
            read="file",
        )
        for s, rate in zip(students, rates, strict=True)
    )
    return found, OwnLaw(family.verifier, laws, pairs)


def _untested(family: _Family, prices: Prices, batch: int) -> bool:
    return extrapolated(prices, family.settings.draft_tokens, batch, family.requests)


def _timed(family: _Family, device: str, label: str, latency: str, prices: Prices, batch: int) -> _Timed:
    plain = plain_seconds(family.requests, prices, batch)
    if latency == PROPORTIONAL:
        seconds = np.stack([_proportional_seconds(family, prices, i, batch) for i in range(len(family.students))])
    else:
        seconds = np.stack([drafted_seconds(family.requests, prices, d, batch) for d in family.drafted])
    return _Timed(
        device=device, label=label, latency=latency, prices=prices, batch=batch, plain=plain, seconds=seconds
    )


def _curves(family: _Family, timed: Sequence[_Timed], domains: Sequence[str | None]) -> list[SizeCurve]:
    """One curve a domain, all from the same sums, so that domains and sizes are compared on the same replicates.

    Curves over all domains are judged together, and so are those of single domains.
    """
    parts = [(None,), tuple(domain for domain in domains if domain is not None)]
    judged: list[dict[str | None, Judged]] = [{} for _ in timed]
    for group in parts:
        contests = [(one.plain, one.seconds, domain) for one in timed for domain in group]
        for at, found in enumerate(judge_sizes(family.bootstrap, contests)):
            judged[at // len(group)][group[at % len(group)]] = found
    return [
        _curve(family, one, domain, bounds[domain])
        for one, bounds in zip(timed, judged, strict=True)
        for domain in domains
    ]


def _curve(family: _Family, timed: _Timed, domain: str | None, judged: Judged) -> SizeCurve:
    plain, seconds, prices, batch = timed.plain, timed.seconds, timed.prices, timed.batch
    sizes, lengths, _ = seconds.shape
    compared = np.stack([d.compared for d in family.drafted], axis=1)
    accepted = np.stack([d.accepted for d in family.drafted], axis=1)
    times = np.concatenate([plain[:, None], seconds.reshape(sizes * lengths, -1).T], axis=1)
    sums = np.concatenate([times, compared, accepted], axis=1)
    shares = family.shares

    def statistic(s: Floats) -> Floats:
        """Speed-ups, acceptances, and the sweet spot, one after the other: (..., 2 sizes + 4)."""
        ratio = s[..., :1] / s[..., 1 : 1 + sizes * lengths]
        speed = ratio.reshape(*s.shape[:-1], sizes, lengths).max(axis=-1)
        rest = s[..., 1 + sizes * lengths :]
        spots = find_spots(shares, speed, within=family.settings.within, gain=family.settings.gain)
        rates = rest[..., sizes:] / rest[..., :sizes]
        return np.concatenate([speed, rates, np.stack(spots[:4], axis=-1)], axis=-1)

    estimates = family.bootstrap.estimates(statistic, sums, domain)
    replicates = family.bootstrap.replicates(statistic, sums, domain)
    chosen = _lengths(family, plain, seconds, domain)
    steps = [_step_s(family, prices, timed.latency, i, batch) for i in range(sizes)]
    points = tuple(
        SizePoint(
            drafter=s.name,
            parameters=s.parameters,
            share=number(s.share) or 0.0,
            layers=s.layers,
            draft_tokens=chosen[i],
            speedup=estimates[i],
            draft_step_s=number(steps[i]) or 0.0,
            cost_ratio=number(steps[i] / _plain_s(family, prices, batch)) or 0.0,
            acceptance=estimates[sizes + i],
            share_in_all=number(s.share_in_all),
        )
        for i, s in enumerate(family.students)
    )
    spot = _spot(family.settings, points, estimates[2 * sizes :], replicates[:, :sizes], shares, judged)
    words = spot_statement(
        verifier=family.verifier,
        device=timed.device,
        batch=batch,
        domain=domain,
        points=points,
        spot=spot,
        label=timed.label,
    )
    return SizeCurve(
        verifier=family.verifier,
        device=timed.device,
        label=timed.label,
        latency=timed.latency,
        batch=batch,
        domain=domain,
        points=points,
        spot=spot,
        statement=words,
    )


def _spot(
    settings: SizeSettings,
    points: Sequence[SizePoint],
    estimates: Sequence[Estimate],
    replicates: Floats,
    shares: Floats,
    judged: Judged,
) -> SweetSpot:
    best, low, high, end = estimates
    spots = find_spots(shares, replicates, within=settings.within, gain=settings.gain)
    best_of, flat_of = shares_of(replicates, [p.drafter for p in points], settings.within)
    top = max(points, key=lambda p: p.speedup.value or 0.0).speedup
    may_be = [p for p, kept in zip(points, judged.may_be_best, strict=True) if kept]
    least, most = judged.bounds
    return SweetSpot(
        best=replace(best, low=may_be[0].share, high=may_be[-1].share),
        low=low,
        high=high,
        gain_end=end,
        within=settings.within,
        gain=settings.gain,
        still_gaining=number(float(spots.gaining.mean())) or 0.0,
        best_of=best_of,
        flat_of=flat_of,
        may_be_best=tuple(p.drafter for p in may_be),
        speedup=top,
        together=replace(top, low=least, high=most),
        pays=least is not None and least > 1,
        costs=most is not None and most < 1,
    )


def _lengths(family: _Family, plain: Floats, seconds: Floats, domain: str | None) -> list[int]:
    """Best draft length of every size on the requests as they are."""
    labels = np.asarray(family.requests.domains, dtype=object)
    mine = np.full(len(labels), True) if domain is None else labels == domain
    totals = seconds[:, :, mine].sum(axis=2)
    return [1 + int(row.argmin()) for row in totals]


def _context(family: _Family, batch: int) -> float:
    requests = family.requests
    return batch * float((requests.prompt_tokens + requests.output_tokens / 2).mean())


def _plain_s(family: _Family, prices: Prices, batch: int) -> float:
    return float(round_seconds(prices, None, 0, batch, _context(family, batch)))


def _step_s(family: _Family, prices: Prices, latency: str, index: int, batch: int) -> float:
    student = family.students[index]
    if latency == PROPORTIONAL:
        return student.share * _plain_s(family, prices, batch)
    return float(prices.draft[student.name].step_seconds(batch, batch, _context(family, batch)))


def _proportional_seconds(family: _Family, prices: Prices, index: int, batch: int) -> Floats:
    """Seconds of requests, shape (K, requests), if a draft step cost its share of parameters of a plain step."""
    share = family.students[index].share
    name = family.students[index].name
    shared = Prices(prices.prefill, prices.verify, {name: Share(prices.verify, share)})
    return drafted_seconds(family.requests, shared, family.drafted[index], batch)


def _acceptance(family: _Family) -> tuple[Floats, Floats]:
    """Acceptance of every size over all requests, and its bootstrap replicates (draws, sizes)."""
    sizes = len(family.students)
    columns = [d.compared for d in family.drafted] + [d.accepted for d in family.drafted]
    sums = np.stack(columns, axis=1)

    def rates(s: Floats) -> Floats:
        return np.asarray(s[..., sizes:] / s[..., :sizes])

    return rates(sums.sum(axis=0)), family.bootstrap.replicates(rates, sums)


def _latency_line(family: _Family, device: str, prices: Prices, batch: int) -> list[LatencyLine]:
    """Fit draft seconds to depth; nothing where a depth is unknown or all are alike."""
    from scipy.stats import linregress, t

    layers = [s.layers for s in family.students]
    if any(depth is None for depth in layers) or len(set(layers)) < LEAST_DEPTHS:
        return []
    depth = np.array([float(d or 0) for d in layers])
    context = _context(family, batch)
    seconds = np.array([float(prices.draft[s.name].step_seconds(batch, batch, context)) for s in family.students])
    line = linregress(depth, seconds)
    reach = float(t.ppf((1 + LEVEL) / 2, len(depth) - 2))
    plain = _plain_s(family, prices, batch)

    def estimate(value: float, error: float) -> Estimate:
        return Estimate(number(value), number(value - reach * error), number(value + reach * error), len(depth))

    smallest = family.students[0]
    return [
        LatencyLine(
            device=device,
            batch=batch,
            base_s=estimate(line.intercept, line.intercept_stderr),
            layer_s=estimate(line.slope, line.stderr),
            r_squared=number(float(line.rvalue) ** 2) or 0.0,
            at_no_depth=number(line.intercept / plain) or 0.0,
            proportional_error=number(float(seconds[0]) / (smallest.share * plain)) or 0.0,
        )
    ]


LEAST_DEPTHS = 3
"""Depths below which no line is drawn through their latencies."""
