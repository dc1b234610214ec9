"""Over batch sizes: where a drafter pays, and the draft lengths to recommend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.common.bootstrap import number
from analysis.speedup.speedup import BestLength, SpeedupCell


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
