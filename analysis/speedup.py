"""Speed-up of speculation over draft length and batch size, from closed-loop simulations of recorded requests.

Every cell of the grid is one simulation in which each recorded request is served once while the batch is kept
full. The simulator attributes the time of every engine iteration to the requests in it, so the throughput of any
set of requests is sum(output_tokens) / sum(engine_seconds) and one simulation serves all domains. Speed-up is the
ratio of that throughput to the one without speculation on the same requests at the same batch size, and its
interval resamples requests for both together (paired).

The interval is conditional on the simulated schedule and on the fitted costs; a domain's figure is for its
requests served among those of the other domains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.bootstrap import ClusterBootstrap, Estimate, Floats, number
from analysis.grid import CellRun


@dataclass(frozen=True)
class SpeedupCell:
    """Speed-up of one drafter at one draft length, batch size and domain (None: all domains).

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
    tokens_per_round: float | None
    break_even_tokens: float | None
    extrapolated: bool


@dataclass(frozen=True)
class BestLength:
    """The draft length with the highest simulated throughput at one batch size, 0 meaning: do not speculate.

    ``speculative_tokens`` is the best length above 0 and ``speedup`` its speed-up, below 1 where ``draft_tokens``
    is 0. ``indistinct`` lists every length, 0 among them, whose throughput cannot be told apart from that of
    ``draft_tokens``: the paired 95% interval of their ratio contains 1. ``pays`` is true when the interval of
    ``speedup`` lies above 1.
    """

    drafter: str
    batch: int
    domain: str | None
    draft_tokens: int
    speculative_tokens: int
    speedup: Estimate
    indistinct: tuple[int, ...]
    pays: bool
    extrapolated: bool


@dataclass(frozen=True)
class Crossover:
    """Where speculation with the best length of each batch size stops paying, for one drafter and domain.

    ``last_paying`` is the largest simulated batch size up to which every one pays, None if the smallest does not
    (or if it is not shown to); ``first_not_paying`` is the next one, None if all pay. ``batch`` is where the
    speed-up crosses 1, interpolated in log batch, None if it does not cross inside the grid. ``pays_again`` lists
    larger batch sizes that pay all the same: fitted costs need not be smooth in the batch.
    """

    drafter: str
    domain: str | None
    last_paying: int | None
    first_not_paying: int | None
    batch: float | None
    pays_again: tuple[int, ...]


def speedup_cells(
    runs: Sequence[CellRun],
    baseline: Mapping[str, str],
    bootstrap: ClusterBootstrap,
    domains: Sequence[str | None],
) -> list[SpeedupCell]:
    """Estimate the speed-up of every speculative run over the plain run at its batch size.

    A domain of which the drafter was recorded on no request has no cell.
    `baseline` names, per drafter, the drafter under which its plain runs stand (see `grid.baselines`).
    """
    plain = {(run.drafter, run.batch): run for run in runs if run.draft_tokens == 0}
    labels = np.asarray(bootstrap.request_domains, dtype=object)
    cells = []
    for run in runs:
        if run.draft_tokens == 0:
            continue
        without = plain[baseline[run.drafter], run.batch]
        sums = np.concatenate([_time_and_tokens(without), _time_and_tokens(run)], axis=1)
        for domain in domains:
            (speedup,) = bootstrap.estimates(_ratio_of_throughputs, sums, domain)
            if speedup.value is None:
                continue
            mine = np.full(len(labels), True) if domain is None else labels == domain
            rounds = float(run.rounds[mine].sum())
            served = mine & (run.output_tokens > 0)  # prefill gives each request its first token
            tokens = float((run.output_tokens[served] - 1).sum()) / rounds if rounds else None
            cells.append(
                SpeedupCell(
                    run.drafter,
                    run.draft_tokens,
                    run.batch,
                    domain,
                    speedup,
                    tokens_per_round=number(tokens),
                    break_even_tokens=number(None if tokens is None else tokens / speedup.value),
                    extrapolated=run.extrapolated or without.extrapolated,
                )
            )
    return cells


def best_lengths(
    runs: Sequence[CellRun],
    baseline: Mapping[str, str],
    bootstrap: ClusterBootstrap,
    domains: Sequence[str | None],
) -> list[BestLength]:
    """Find the best draft length per drafter, batch size and domain, and which lengths come as close.

    A domain of which the drafter was recorded on no request has no row. `baseline` as in `speedup_cells`.
    """
    plain = {(run.drafter, run.batch): run for run in runs if run.draft_tokens == 0}
    groups: dict[tuple[str, int], list[CellRun]] = {}
    for run in runs:
        if run.draft_tokens > 0:
            groups.setdefault((run.drafter, run.batch), []).append(run)
    found = (
        _best(
            drafter,
            [plain[baseline[drafter], batch], *sorted(group, key=lambda r: r.draft_tokens)],
            bootstrap,
            domain,
        )
        for (drafter, batch), group in groups.items()
        for domain in domains
    )
    return [row for row in found if row is not None]


def _best(
    drafter: str, runs: Sequence[CellRun], bootstrap: ClusterBootstrap, domain: str | None
) -> BestLength | None:
    """Compare the plain run (first) and the speculative ones of one drafter and batch size."""
    sums = np.concatenate([_time_and_tokens(run) for run in runs], axis=1)
    speedups = bootstrap.estimates(lambda s: _throughputs(s) / _throughputs(s)[..., :1], sums, domain)
    values = np.array([np.nan if s.value is None else s.value for s in speedups])
    if np.isnan(values).all():
        return None
    best = int(np.nanargmax(values))
    speculative = 1 + int(np.nanargmax(values[1:]))
    ratios = bootstrap.estimates(lambda s: _throughputs(s) / _throughputs(s)[..., best : best + 1], sums, domain)
    chosen = speedups[speculative]
    return BestLength(
        drafter=drafter,
        batch=runs[0].batch,
        domain=domain,
        draft_tokens=runs[best].draft_tokens,
        speculative_tokens=runs[speculative].draft_tokens,
        speedup=chosen,
        indistinct=tuple(
            run.draft_tokens
            for run, ratio in zip(runs, ratios, strict=True)
            if run is runs[best] or ratio.high is None or ratio.high >= 1
        ),
        pays=chosen.low is not None and chosen.low > 1,
        extrapolated=runs[speculative].extrapolated or runs[0].extrapolated,
    )


def crossovers(best: Iterable[BestLength]) -> list[Crossover]:
    """Find, per drafter and domain, the batch sizes between which speculation stops paying."""
    groups: dict[tuple[str, str | None], list[BestLength]] = {}
    for row in best:
        groups.setdefault((row.drafter, row.domain), []).append(row)
    found = []
    for (drafter, domain), rows in groups.items():
        rows.sort(key=lambda row: row.batch)
        paying = 0
        while paying < len(rows) and rows[paying].pays:
            paying += 1
        found.append(
            Crossover(
                drafter,
                domain,
                last_paying=rows[paying - 1].batch if paying else None,
                first_not_paying=rows[paying].batch if paying < len(rows) else None,
                batch=_crossing([r.batch for r in rows], [r.speedup.value for r in rows]),
                pays_again=tuple(row.batch for row in rows[paying:] if row.pays),
            )
        )
    return found


def _crossing(batches: Sequence[int], speedups: Sequence[float | None]) -> float | None:
    """Batch size at which the speed-up first falls through 1, linear in log batch; None if it never does."""
    points = [(np.log(b), s) for b, s in zip(batches, speedups, strict=True) if s is not None]
    for (x0, s0), (x1, s1) in itertools.pairwise(points):
        if s0 > 1 >= s1:
            return number(np.exp(x0 + (s0 - 1) / (s0 - s1) * (x1 - x0)))
    return None


def _time_and_tokens(run: CellRun) -> Floats:
    return np.stack([run.output_tokens, run.engine_seconds], axis=1)


def _throughputs(sums: Floats) -> Floats:
    """Tokens per engine second from columns (tokens, seconds) repeated, shape (..., runs)."""
    return np.asarray(sums[..., 0::2] / sums[..., 1::2])


def _ratio_of_throughputs(sums: Floats) -> Floats:
    rates = _throughputs(sums)
    return rates[..., 1:] / rates[..., :1]
