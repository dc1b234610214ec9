"""Speed-up of speculation over draft length and batch size, from closed-loop simulations of recorded requests.

Every cell of the grid is one simulation in which each recorded request is served once while the batch is kept
full. The simulator attributes the time of every engine iteration to the requests in it, so the throughput of any
set of requests is sum(output_tokens) / sum(engine_seconds) and one simulation serves all domains. Speed-up is the
ratio of that throughput to the one without speculation on the same requests at the same batch size, and its
interval resamples requests for both together (paired).

Drafters, lengths and batch sizes are compared on the same requests and the best is then judged, so what pays is
decided by bounds that hold for all of them at once (`Candidates.simultaneous`): one family of every drafter, draft
length and batch size over all domains pooled, and a second one of all of these over single domains. With 2.5% on the
side that matters in each, at most one study in twenty says "pays" anywhere where nothing does.

Intervals are conditional on the simulated schedule. Those ``with_costs`` also cover the error of the fitted step
costs (`analysis.speedup.costfit`), the others take the costs as given. A domain's figure is for its requests served
among those of the other domains.

Over batch sizes: where a drafter pays, and the draft lengths to recommend.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.common.bootstrap import Bounds, Candidates, ClusterBootstrap, Estimate, number
from analysis.speedup.costfit import CostDraws
from analysis.speedup.grid import CellRun
from calibration.common.arrays import Floats


@dataclass(frozen=True)
class SpeedupCell:
    """Speed-up of one drafter at one draft length, batch size and domain (None: all domains).

    ``speedup`` has the interval of a length that was chosen beforehand; ``simultaneous`` the bounds that hold for all
    cells of its family at once, over requests; ``with_costs`` those over requests and fitted costs, None where the
    error of the costs is not known.
    ``tokens_per_round`` is what a round committed, bonus included, the last round of a request cut at the end of its
    text; ``break_even_tokens`` what it would have needed for a speed-up of 1 at the same cost per round:
    tokens_per_round / speedup, prefill aside. Both are None where no round was played.
    ``extrapolated`` says that more than one iteration in a hundred, with or without speculation, was priced outside
    the measured range.
    """

    drafter: str
    draft_tokens: int
    batch: int
    domain: str | None
    speedup: Estimate
    simultaneous: Estimate
    with_costs: Estimate | None
    tokens_per_round: float | None
    break_even_tokens: float | None
    extrapolated: bool

    @property
    def pays(self) -> bool:
        """Whether it is shown to pay for such requests at the costs as they were fitted or given."""
        return _above(self.simultaneous)

    @property
    def pays_with_costs(self) -> bool | None:
        """Whether it is shown to pay whatever the fitted costs err by; None where their error is not known."""
        return None if self.with_costs is None else self.pays and _above(self.with_costs)

    @property
    def within_costs(self) -> bool:
        """Whether it pays for the requests alone: the gain is within the error of the fitted costs."""
        return self.pays and self.pays_with_costs is False


@dataclass(frozen=True)
class BestLength:
    """The draft length with the highest simulated throughput at one batch size, 0 meaning: do not speculate.

    ``speculative_tokens`` is the length above 0 that says most for speculation: of those shown to pay (with costs
    before those for the requests alone) the fastest, else the fastest; ``speedup``, ``simultaneous`` and
    ``with_costs`` are those of its `SpeedupCell`. ``indistinct`` lists every length, 0 among them, that may be the
    best one (multiple comparisons with the best at 95%, over requests), ``indistinct_with_costs`` those that
    may be once the costs are drawn too; None where their error is not known. ``pays``: the simultaneous interval over
    requests lies above 1; ``pays_with_costs``: the one over requests and costs does too. ``loses``: at every length
    tried, the widest of these intervals lies below 1.
    """

    drafter: str
    batch: int
    domain: str | None
    draft_tokens: int
    speculative_tokens: int
    speedup: Estimate
    simultaneous: Estimate
    with_costs: Estimate | None
    indistinct: tuple[int, ...]
    indistinct_with_costs: tuple[int, ...] | None
    pays: bool
    pays_with_costs: bool | None
    loses: bool
    extrapolated: bool

    @property
    def within_costs(self) -> bool:
        """Whether it pays for the requests alone: the gain is within the error of the fitted costs."""
        return self.pays and self.pays_with_costs is False


def speedup_cells(
    runs: Sequence[CellRun],
    baseline: Mapping[str, str],
    bootstrap: ClusterBootstrap,
    domains: Sequence[str | None],
    costs: CostDraws | None = None,
) -> list[SpeedupCell]:
    """Estimate the speed-up of every speculative run over the plain run at its batch size.

    A domain of which the drafter was recorded on no request has no cell.
    `baseline` names, per drafter, the drafter under which its plain runs stand (see `grid.baselines`); `costs` draws
    the fitted costs anew, None leaves their error out.
    """
    return [cell for group in compare_lengths(runs, baseline, bootstrap, domains, costs) for cell in group.cells]


def best_lengths(
    runs: Sequence[CellRun],
    baseline: Mapping[str, str],
    bootstrap: ClusterBootstrap,
    domains: Sequence[str | None],
    costs: CostDraws | None = None,
) -> list[BestLength]:
    """Find the best draft length per drafter, batch size and domain, and which lengths may be as good.

    A domain of which the drafter was recorded on no request has no row. Arguments as in `speedup_cells`.
    """
    return [best_length(group) for group in compare_lengths(runs, baseline, bootstrap, domains, costs)]


@dataclass(frozen=True)
class LengthsCompared:
    """The draft lengths of one drafter at one batch size and domain.

    ``cells`` are those above 0; the candidates are speed-ups of no speculation (1) and of the cells in their order.
    """

    cells: tuple[SpeedupCell, ...]
    requests: Candidates
    with_costs: Candidates | None


def compare_lengths(
    runs: Sequence[CellRun],
    baseline: Mapping[str, str],
    bootstrap: ClusterBootstrap,
    domains: Sequence[str | None],
    costs: CostDraws | None = None,
) -> list[LengthsCompared]:
    """Compare all draft lengths of each drafter, batch size and domain, with bounds that hold for all at once.

    Arguments as in `speedup_cells`. Pooled rows are one family of simultaneous bounds, rows of domains another.
    """
    plain = {(run.drafter, run.batch): run for run in runs if run.draft_tokens == 0}
    by_drafter: dict[tuple[str, int], list[CellRun]] = {}
    for run in runs:
        if run.draft_tokens > 0:
            by_drafter.setdefault((run.drafter, run.batch), []).append(run)
    groups = []
    for (drafter, batch), group in by_drafter.items():
        timed = [
            _Timed.of(run, costs)
            for run in (plain[baseline[drafter], batch], *sorted(group, key=lambda run: run.draft_tokens))
        ]
        groups += [found for domain in domains if (found := _Group.of(timed, bootstrap, domain)) is not None]
    compared: list[LengthsCompared] = []
    for pooled in (True, False):
        family = [group for group in groups if (group.domain is None) == pooled]
        judged = zip(_together([g.requests for g in family]), _together([g.with_costs for g in family]), strict=True)
        for found, (bounds, with_costs) in zip(family, judged, strict=True):
            assert bounds is not None  # every group has candidates over requests
            compared.append(found.judged(bootstrap, bounds, with_costs))
    return compared


@dataclass(frozen=True)
class _Timed:
    """A run with the time of its requests by step, and the drawn factors of these steps (None: not known)."""

    run: CellRun
    sums: Floats
    factors: Floats | None

    @classmethod
    def of(cls, run: CellRun, costs: CostDraws | None) -> _Timed:
        drawn = None if costs is None else costs.of_run(run)
        columns = [run.output_tokens[:, None], run.engine_seconds[:, None]]
        if drawn is not None:
            columns.append(drawn[0])
        return cls(run, np.concatenate(columns, axis=1), None if drawn is None else drawn[1])

    @property
    def plain(self) -> _Timed:
        """The same without the times by step."""
        return _Timed(self.run, self.sums[:, :2], None)


def _speedups(timed: Sequence[_Timed], *, with_costs: bool) -> Callable[[Floats], Floats]:
    """The statistic: throughput of each run over that of the first, from the sums of `timed` side by side.

    With costs, the r-th replicate of the requests takes the r-th draw of the costs.
    """
    ends = np.cumsum([one.sums.shape[1] for one in timed])

    def statistic(sums: Floats) -> Floats:
        rates = []
        for one, part in zip(timed, np.split(sums, ends[:-1], axis=-1), strict=True):
            seconds = part[..., 1]
            if with_costs and sums.ndim > 1 and one.factors is not None:
                seconds = seconds + ((one.factors - 1) * part[..., 2:]).sum(axis=-1)
            rates.append(part[..., 0] / seconds)
        found = np.stack(rates, axis=-1)
        return np.asarray(found / found[..., :1])

    return statistic


@dataclass(frozen=True)
class _Group:
    """One drafter, batch size and domain before its family is judged; `timed` starts with no speculation."""

    domain: str | None
    timed: Sequence[_Timed]
    estimates: tuple[Estimate, ...]
    requests: Candidates
    with_costs: Candidates | None

    @classmethod
    def of(cls, timed: Sequence[_Timed], bootstrap: ClusterBootstrap, domain: str | None) -> _Group | None:
        """None where the drafter was recorded on no request of the domain."""
        sums = np.concatenate([one.sums for one in timed], axis=1)
        statistic = _speedups(timed, with_costs=False)
        estimates = bootstrap.estimates(statistic, sums, domain)
        if all(one.value is None for one in estimates):
            return None
        plain = np.concatenate([one.sums[:, :2] for one in timed], axis=1)  # the costs by step are not needed here
        requests = bootstrap.candidates(_speedups([one.plain for one in timed], with_costs=False), plain, domain)
        with_costs = None
        if all(one.factors is not None for one in timed):
            drawn = bootstrap.candidates(_speedups(timed, with_costs=True), sums, domain, errors=False)
            with_costs = drawn.spread_more_than(requests)
        return cls(domain, timed, estimates, requests, with_costs)

    def judged(
        self, bootstrap: ClusterBootstrap, bounds: Sequence[Bounds], with_costs: Sequence[Bounds] | None
    ) -> LengthsCompared:
        """Put the bounds of the family to the lengths."""
        labels = np.asarray(bootstrap.request_domains, dtype=object)
        mine = np.full(len(labels), True) if self.domain is None else labels == self.domain
        plain, *speculative = (one.run for one in self.timed)
        cells = []
        for i, run in enumerate(speculative):
            speedup = self.estimates[1 + i]
            tokens = _tokens_per_round(run, mine)
            broken_even = None if tokens is None or not speedup.value else tokens / speedup.value
            cells.append(
                SpeedupCell(
                    drafter=run.drafter,
                    draft_tokens=run.draft_tokens,
                    batch=run.batch,
                    domain=self.domain,
                    speedup=speedup,
                    simultaneous=Estimate(speedup.value, *bounds[i], speedup.requests),
                    with_costs=None
                    if with_costs is None
                    else Estimate(speedup.value, *with_costs[i], speedup.requests),
                    tokens_per_round=number(tokens),
                    break_even_tokens=number(broken_even),
                    extrapolated=run.extrapolated or plain.extrapolated,
                )
            )
        return LengthsCompared(tuple(cells), self.requests, self.with_costs)


def _together(groups: Sequence[Candidates | None]) -> Iterator[list[Bounds] | None]:
    """Simultaneous bounds of the lengths above 0 of all groups, one list a group; None where a group has none."""
    speculative = [None if one is None else one.part(slice(1, None)) for one in groups]
    family = [one for one in speculative if one is not None]
    bounds = iter(Candidates.join(family).simultaneous() if family else ())
    for one in speculative:
        yield None if one is None else [next(bounds) for _ in one.values]


def _tokens_per_round(run: CellRun, mine: NDArray[np.bool_]) -> float | None:
    rounds = float(run.rounds[mine].sum())
    served = mine & (run.output_tokens > 0)  # prefill gives each request its first token
    return float((run.output_tokens[served] - 1).sum()) / rounds if rounds else None


def best_length(compared: LengthsCompared) -> BestLength:
    """Give the best of the lengths compared, and which may be as good."""
    cells, values = compared.cells, compared.requests.values
    lengths = (0, *(cell.draft_tokens for cell in cells))
    best = int(np.nanargmax(values))
    # The bounds hold for all cells at once, so any that lies above 1 tells; which is the fastest is another question.
    chosen = max(
        (cell for cell in cells if cell.speedup.value is not None),
        key=lambda cell: (bool(cell.pays_with_costs), cell.pays, cell.speedup.value or 0.0),
    )
    widest = [cell.with_costs or cell.simultaneous for cell in cells]
    return BestLength(
        drafter=chosen.drafter,
        batch=chosen.batch,
        domain=chosen.domain,
        draft_tokens=lengths[best],
        speculative_tokens=chosen.draft_tokens,
        speedup=chosen.speedup,
        simultaneous=chosen.simultaneous,
        with_costs=chosen.with_costs,
        indistinct=_may_be_best(lengths, best, compared.requests),
        indistinct_with_costs=(
            None if compared.with_costs is None else _may_be_best(lengths, best, compared.with_costs)
        ),
        pays=chosen.pays,
        pays_with_costs=chosen.pays_with_costs,
        loses=all(one.high is not None and one.high < 1 for one in (*widest, *(c.simultaneous for c in cells))),
        extrapolated=chosen.extrapolated,
    )


def _may_be_best(lengths: Sequence[int], best: int, candidates: Candidates) -> tuple[int, ...]:
    inside = candidates.best_set()
    return tuple(k for i, (k, may) in enumerate(zip(lengths, inside, strict=True)) if may or i == best)


def _above(estimate: Estimate) -> bool:
    return estimate.low is not None and estimate.low > 1


@dataclass(frozen=True)
class Crossover:
    """At which simulated batch sizes speculation with the best fixed length pays, for one drafter and domain.

    Every batch size is in one of ``pays`` (`BestLength.pays`), ``loses`` (shown to lose at every length tried) and
    ``not_shown``. ``within_costs`` are those of ``pays`` where it pays for the requests alone: the gain is within the
    error of the fitted costs. ``batch`` is where the speed-up first falls through 1, interpolated in log batch, None
    if it does not inside the grid.
    """

    drafter: str
    domain: str | None
    pays: tuple[int, ...]
    within_costs: tuple[int, ...]
    not_shown: tuple[int, ...]
    loses: tuple[int, ...]
    batch: float | None


@dataclass(frozen=True)
class Schedule:
    """Draft lengths to recommend by batch size, 0 meaning no speculation: they do not grow with the batch.

    Each length may be the best at its batch size (`BestLength.indistinct_with_costs`, or ``indistinct`` where the
    error of the costs is not known), is above 0 where speculation pays, and is itself shown to pay with costs where
    the fastest one is: a gain that is shown is not given up for one that is not. Of all such schedules it is the one
    with the least regret: what its lengths reach less than the fastest ones, summed as logarithms of throughput.
    ``regrets`` are these shares by batch size, if the costs are as fitted. ``breaks`` lists batch sizes that fit no
    such order (as few as possible): each keeps its fastest length.
    """

    drafter: str
    domain: str | None
    batches: tuple[int, ...]
    draft_tokens: tuple[int, ...]
    regrets: tuple[float, ...]
    breaks: tuple[int, ...]


def crossovers(best: Iterable[BestLength]) -> list[Crossover]:
    """Sort, per drafter and domain, the batch sizes into those that pay, lose, or show neither."""
    return [
        Crossover(
            drafter,
            domain,
            pays=tuple(row.batch for row in rows if row.pays),
            within_costs=tuple(row.batch for row in rows if row.within_costs),
            not_shown=tuple(row.batch for row in rows if not row.pays and not row.loses),
            loses=tuple(row.batch for row in rows if row.loses),
            batch=_crossing([r.batch for r in rows], [r.speedup.value for r in rows]),
        )
        for (drafter, domain), rows in _by_drafter(best).items()
    ]


def schedules(best: Iterable[BestLength], cells: Iterable[SpeedupCell]) -> list[Schedule]:
    """Recommend draft lengths over batch size, per drafter and domain of `best`; `cells` have their speed-ups."""
    by_row: dict[tuple[str, int, str | None], list[SpeedupCell]] = {}
    for cell in cells:
        by_row.setdefault((cell.drafter, cell.batch, cell.domain), []).append(cell)
    found = []
    for (drafter, domain), rows in _by_drafter(best).items():
        regrets = [_regrets(row, by_row[drafter, row.batch, domain]) for row in rows]
        lengths, broken = falling(regrets)
        found.append(
            Schedule(
                drafter,
                domain,
                batches=tuple(row.batch for row in rows),
                draft_tokens=lengths,
                regrets=tuple(number(1 - math.exp(-r[k])) or 0.0 for r, k in zip(regrets, lengths, strict=True)),
                breaks=tuple(rows[i].batch for i in broken),
            )
        )
    return found


def _regrets(row: BestLength, cells: Sequence[SpeedupCell]) -> dict[int, float]:
    """The lengths that may be recommended in place of the fastest one, and what each falls short of it."""
    speedups = {0: 1.0} | {cell.draft_tokens: cell.speedup.value for cell in cells if cell.speedup.value}
    alike = set(row.indistinct if row.indistinct_with_costs is None else row.indistinct_with_costs)
    if row.pays:
        alike.discard(0)
    if row.pays_with_costs:
        alike &= {cell.draft_tokens for cell in cells if cell.pays_with_costs}
    fastest = max(speedups.values())
    return {k: math.log(fastest / speedups[k]) for k in sorted(alike) if k in speedups}


def falling(regrets: Sequence[Mapping[int, float]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose one key of each mapping so that they never rise, with the least sum of values.

    Where no choice is free of rises, as few mappings as possible are left out of the order and take their own least
    value. Gives the keys, and the places left out. Of equal choices the one with the shorter lengths is taken.
    """
    ceiling = max(max(one) for one in regrets)
    # By the last key in order: (places left out, sum of values, keys), the cheapest way to get there.
    ways: dict[int, tuple[int, float, tuple[int, ...], tuple[int, ...]]] = {ceiling: (0, 0.0, (), ())}
    for place, one in enumerate(regrets):
        own = min(one, key=lambda k: (one[k], k))
        following: dict[int, tuple[int, float, tuple[int, ...], tuple[int, ...]]] = {}
        for last, (left_out, total, keys, broken) in ways.items():
            steps = [(k, (left_out, total + one[k], (*keys, k), broken)) for k in one if k <= last]
            steps.append((last, (left_out + 1, total + one[own], (*keys, own), (*broken, place))))
            for key, way in steps:
                if key not in following or way < following[key]:
                    following[key] = way
        ways = following
    _, _, keys, broken = min(ways.values())
    return keys, broken


def _by_drafter(best: Iterable[BestLength]) -> dict[tuple[str, str | None], list[BestLength]]:
    """Rows of each drafter and domain, by batch size."""
    groups: dict[tuple[str, str | None], list[BestLength]] = {}
    for row in best:
        groups.setdefault((row.drafter, row.domain), []).append(row)
    return {key: sorted(rows, key=lambda row: row.batch) for key, rows in groups.items()}


def _crossing(batches: Sequence[int], speedups: Sequence[float | None]) -> float | None:
    """Batch size at which the speed-up first falls through 1, linear in log batch; None if it never does."""
    points = [(np.log(b), s) for b, s in zip(batches, speedups, strict=True) if s is not None]
    for (x0, s0), (x1, s1) in itertools.pairwise(points):
        if s0 > 1 >= s1:
            return number(np.exp(x0 + (s0 - 1) / (s0 - s1) * (x1 - x0)))
    return None
