"""Specialists against the generalist, prompt by prompt: replay alone, no prices.

Paired tests: two drafters on the same prompts, and Holm's correction where many pairs are tested.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from analysis.common.bootstrap import Candidates, ClusterBootstrap, number
from analysis.common.rounds import recording, replay_rounds
from analysis.knowledge.findings import PairedRow, Student, TransferCell, Verdict
from calibration.common.arrays import Floats
from calibration.traces import TraceSet

_EXACT = 13
"""Prompts up to which all 2^n sign flips are played."""
FLIPS = 20_000
"""Sign flips drawn where there are more prompts."""


def flip_test(first: Floats, second: Floats, rng: Generator) -> tuple[float, bool]:
    """Give (two-sided p-value, whether it is exact) of no difference between two drafters.

    `first` and `second`: (accepted tokens, rounds) of every prompt, shape (prompts, 2). Under the null hypothesis
    that the drafters are exchangeable on every prompt, swapping them there changes nothing; the statistic is the
    difference of accepted tokens per round, ratios of sums over prompts. Fisher's paired permutation test: all 2^n
    flips, or `FLIPS` drawn, where p = (1 + as extreme) / (1 + drawn) (Phipson and Smyth 2010).
    """
    prompts = len(first)
    if prompts == 0:
        return 1.0, True
    exact = prompts <= _EXACT
    if exact:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=prompts)))
    else:
        signs = rng.choice((1.0, -1.0), size=(FLIPS, prompts))
    total, half = (first + second).sum(axis=0), signs @ (first - second)
    observed = abs(_per_round(first.sum(axis=0)) - _per_round(second.sum(axis=0)))
    flipped = np.abs(_per_round((total + half) / 2) - _per_round((total - half) / 2))
    extreme = float(np.count_nonzero(flipped >= observed - 1e-12))
    p = extreme / len(signs) if exact else (1 + extreme) / (1 + FLIPS)
    return number(p) or 0.0, exact


def holm(p_values: Sequence[float]) -> list[float]:
    """Give p-values adjusted by Holm 1979: all of a family hold together at the stated level."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    return [number(p) or 0.0 for p in multipletests(list(p_values), method="holm")[1].tolist()]


def _per_round(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / sums[..., 1])


LEVEL = 0.05


class Replayed:
    """(accepted tokens, complete rounds) of every prompt, for each drafter: shape (requests, 2)."""

    def __init__(self, traces: TraceSet, drafters: Sequence[str], draft_tokens: int) -> None:
        self.domains = np.asarray(traces.sequences["domain"].to_pylist(), dtype=object)
        self._sums: dict[str, Floats] = {}
        for name in drafters:
            rounds = replay_rounds(recording(traces, name), draft_tokens)
            self._sums[name] = np.stack([rounds.accepted, rounds.rounds], axis=1)

    def of(self, drafter: str) -> Floats:
        """Give the sums of `drafter`."""
        return self._sums[drafter]

    def at_home(self, specialists: Sequence[Student]) -> Floats:
        """Give the sums of each domain's own specialist; zeros elsewhere."""
        sums = np.zeros_like(next(iter(self._sums.values())))
        for student in specialists:
            mine = self.domains == student.home
            sums[mine] = self._sums[student.name][mine]
        return sums


def paired_rows(
    replayed: Replayed,
    generalist: Student,
    specialists: Sequence[Student],
    bootstrap: ClusterBootstrap,
    rng: Generator,
) -> tuple[PairedRow, tuple[PairedRow, ...]]:
    """Give the pooled comparison at home, and one row for each specialist and domain; see `PairedRow`."""
    base = replayed.of(generalist.name)
    rows = [
        _row(student.name, domain, domain == student.home, replayed.of(student.name), base, bootstrap, rng)
        for student in specialists
        for domain in bootstrap.domains
    ]
    adjusted: list[PairedRow] = []
    for family in (True, False):
        mine = [row for row in rows if row.home is family]
        adjusted += [_judged(row, p) for row, p in zip(mine, holm([r.p_value for r in mine]), strict=True)]
    homes = np.isin(replayed.domains, np.array([student.home for student in specialists], dtype=object))
    at_home = replayed.at_home(specialists)
    pooled = _row(None, None, True, at_home, np.where(homes[:, None], base, 0.0), bootstrap, rng)
    return _judged(pooled, pooled.p_value), tuple(adjusted)


def transfer_cells(
    replayed: Replayed, generalist: Student, specialists: Sequence[Student], bootstrap: ClusterBootstrap
) -> tuple[TransferCell, ...]:
    """Give accepted tokens per round over the generalist's, for each specialist and domain, the bonus excluded."""
    base = replayed.of(generalist.name)
    pairs = [(student.name, domain) for student in specialists for domain in bootstrap.domains]
    sums = {name: np.concatenate([replayed.of(name), base], axis=1) for name, _ in pairs}
    family = Candidates.join([bootstrap.candidates(_relative, sums[name], domain) for name, domain in pairs])
    cells = []
    for (name, domain), (low, high) in zip(pairs, family.simultaneous(), strict=True):
        (relative,) = bootstrap.estimates(_relative, sums[name], domain)
        together = dataclasses.replace(relative, low=low, high=high)
        cells.append(TransferCell(name, domain, relative, together))
    return tuple(cells)


def _row(
    specialist: str | None,
    domain: str | None,
    home: bool,
    own: Floats,
    base: Floats,
    bootstrap: ClusterBootstrap,
    rng: Generator,
) -> PairedRow:
    sums = np.concatenate([own, base], axis=1)
    first, second, difference = bootstrap.estimates(_tokens, sums, domain)
    labels = np.asarray(bootstrap.request_domains, dtype=object)
    kept = (sums[:, 1] > 0) & (sums[:, 3] > 0) & (True if domain is None else labels == domain)
    p, exact = flip_test(own[kept], base[kept], rng)
    return PairedRow(
        specialist,
        domain,
        home,
        specialist_tokens=dataclasses.replace(first, requests=int(kept.sum())),
        generalist_tokens=dataclasses.replace(second, requests=int(kept.sum())),
        difference=dataclasses.replace(difference, requests=int(kept.sum())),
        p_value=p,
        exact=exact,
        p_adjusted=p,
        verdict="cannot tell apart",
    )


def _judged(row: PairedRow, p_adjusted: float) -> PairedRow:
    verdict: Verdict = "cannot tell apart"
    if p_adjusted < LEVEL and row.difference.value is not None:
        verdict = "better" if row.difference.value > 0 else "worse"
    return dataclasses.replace(row, p_adjusted=p_adjusted, verdict=verdict)


def _tokens(s: Floats) -> Floats:
    first, second = 1 + s[..., 0] / s[..., 1], 1 + s[..., 2] / s[..., 3]
    return np.stack([first, second, first - second], axis=-1)


def _relative(s: Floats) -> Floats:
    return np.asarray((s[..., 0] / s[..., 1] / (s[..., 2] / s[..., 3]))[..., None])
