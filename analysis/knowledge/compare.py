"""Specialists against the generalist, prompt by prompt: replay alone, no prices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from analysis.common.bootstrap import Candidates, ClusterBootstrap
from analysis.common.rounds import recording, replay_rounds
from analysis.knowledge.findings import PairedRow, Student, TransferCell, Verdict
from analysis.knowledge.paired import flip_test, holm
from calibration.common.arrays import Floats
from calibration.traces import TraceSet

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
