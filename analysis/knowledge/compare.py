"""Specialists against the generalist, prompt by prompt: replay alone, no prices.

Paired tests: two drafters on the same prompts, and Holm's correction where many pairs are tested.

What a router of given accuracy is worth, from the table of every request with every drafter at batch 1.

Which drafter is the generalist and which are specialists.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.random import Generator

from analysis.common.bootstrap import Candidates, ClusterBootstrap, Estimate, number
from analysis.common.rounds import recording, replay_rounds
from analysis.knowledge.findings import (
    Level,
    PairedRow,
    RouterPoint,
    RouterValue,
    SpeedRow,
    Student,
    TransferCell,
    Verdict,
)
from analysis.routing.served import Priced, RequestTable, Served, Server
from calibration.common.arrays import Floats
from calibration.common.errors import ReplayError, did_you_mean
from calibration.traces import DrafterInfo, TraceSet

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
        _row(
            specialist=student.name,
            domain=domain,
            home=domain == student.home,
            own=replayed.of(student.name),
            base=base,
            bootstrap=bootstrap,
            rng=rng,
        )
        for student in specialists
        for domain in bootstrap.domains
    ]
    adjusted: list[PairedRow] = []
    for family in (True, False):
        mine = [row for row in rows if row.home is family]
        adjusted += [_judged(row, p) for row, p in zip(mine, holm([r.p_value for r in mine]), strict=True)]
    homes = np.isin(replayed.domains, np.array([student.home for student in specialists], dtype=object))
    at_home = replayed.at_home(specialists)
    pooled = _row(
        specialist=None,
        domain=None,
        home=True,
        own=at_home,
        base=np.where(homes[:, None], base, 0.0),
        bootstrap=bootstrap,
        rng=rng,
    )
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


def cast(
    traces: TraceSet, generalist: str | None, specialists: Mapping[str, str] | None
) -> tuple[Student, tuple[Student, ...]]:
    """Give the generalist and the specialists of `traces`; `specialists` maps names to home domains.

    Left out, they are read from the manifest: specialists are distilled drafters that trained on one domain, the
    generalist the one drafter of their parameter count that trained on several. Raises `ReplayError` where that is
    not clear, or a name or domain is not in the TraceSet.
    """
    infos = {info.name: info for info in traces.manifest.drafters}
    served = set(traces.sequences["domain"].to_pylist())
    if specialists is None:
        found = {name: _domains(info) for name, info in infos.items()}
        specialists = {name: of[0] for name, of in found.items() if len(of) == 1}
        if not specialists:
            raise ReplayError("knowledge: no drafter says that it trained on one domain alone; name the specialists")
    for name, domain in specialists.items():
        if name not in infos:
            raise ReplayError(f"specialists: not in the TraceSet, got '{name}'{did_you_mean(name, infos)}")
        if domain not in served:
            raise ReplayError(f"specialists.{name}: no such domain, got '{domain}'{did_you_mean(domain, served)}")
    if generalist is None:
        sizes = {infos[name].parameters for name in specialists}
        alike = [n for n, info in infos.items() if len(_domains(info)) > 1 and {info.parameters} == sizes]
        if len(alike) != 1:
            got = ", ".join(alike) or "none"
            raise ReplayError(
                "knowledge: exactly one drafter of the specialists' size must have trained on several domains, got "
                f"{got}; name the generalist"
            )
        generalist = alike[0]
    if generalist not in infos:
        raise ReplayError(f"generalist: not in the TraceSet, got '{generalist}'{did_you_mean(generalist, infos)}")
    if generalist in specialists:
        raise ReplayError(f"generalist: must not be one of the specialists, got '{generalist}'")
    homes = sorted(specialists.items(), key=lambda item: (item[1], item[0]))
    if len({domain for _, domain in homes}) < len(homes):
        raise ReplayError("specialists: each domain must have one specialist at most")
    return _student(infos[generalist], None), tuple(_student(infos[name], domain) for name, domain in homes)


def _recipe(info: DrafterInfo) -> Mapping[str, Any]:
    recipe = info.settings.get("recipe") if isinstance(info.settings, Mapping) else None
    return recipe if isinstance(recipe, Mapping) else {}


def _domains(info: DrafterInfo) -> list[str]:
    """Give the domains that a drafter says it trained on."""
    domains = _recipe(info).get("domains")
    return [str(name) for name in domains] if isinstance(domains, list | tuple) else []


def _student(info: DrafterInfo, home: str | None) -> Student:
    recipe = _recipe(info)
    texts, tokens = (recipe.get(key) if isinstance(recipe.get(key), int) else None for key in ("texts", "tokens"))
    return Student(info.name, home, info.parameters, texts, tokens)


GENERALIST, LABEL, BY_REQUEST, BY_ROUND = "generalist", "label", "oracle by request", "oracle by round"


def router_value(
    traces: TraceSet,
    generalist: Student,
    specialists: Sequence[Student],
    priced: Priced,
    lengths: Sequence[int],
    accuracies: Sequence[float],
    bootstrap: ClusterBootstrap,
    *,
    seed: int = 0,
) -> RouterValue:
    """Simulate every drafter alone, and the oracle by round; the rest is sums over the table.

    The right drafter of a request is the specialist of its domain, the generalist where there is none. Exact at batch
    1 for greedy traces; sampled ones play one luck, the same for all. `bootstrap` is over the same requests in the
    same order.
    """
    names = (generalist.name, *(student.name for student in specialists))
    server = Server(traces, names, priced, seed=seed)
    alone = {
        k: float(server.serve({"policy": "static", "drafter": generalist.name}, k).seconds.sum()) for k in lengths
    }
    draft_tokens = min(alone, key=lambda k: alone[k])
    table = server.table(draft_tokens)
    best = server.serve({"policy": "oracle_round", "by": "seconds"}, draft_tokens)
    expert = {student.home: 1 + i for i, student in enumerate(specialists)}
    label = np.array([expert.get(domain, 0) for domain in table.domains])
    costs = choices(table, label, best)
    levels, curve = _levels(table, costs, bootstrap), _curve(table, costs, accuracies, bootstrap)
    gain, even = _gain(table, costs, bootstrap, np.ones(len(label), dtype=bool))
    _, even_at_home = _gain(table, costs, bootstrap, label > 0)
    return RouterValue(
        priced.note,
        number(server.extrapolated) or 0.0,
        draft_tokens,
        chance=1 / len(names),
        levels=levels,
        curve=curve,
        break_even=even,
        break_even_at_home=even_at_home,
        gain=gain,
        speed=_speed(table, specialists, label, bootstrap),
    )


def choices(table: RequestTable, label: np.ndarray, by_round: Served) -> dict[str, Floats]:
    """Give (rounds, seconds) of every request, shape (requests, 2), by who chooses; column 0 is the generalist.

    ``wrong`` is the mean over all drafters but the right one.
    """
    row = np.arange(len(label))
    both = np.stack([table.rounds, table.seconds], axis=2)
    right = both[row, label]
    others = both.shape[1] - 1
    wrong = (both.sum(axis=1) - right) / others if others else right
    return {
        GENERALIST: both[:, 0],
        LABEL: right,
        "wrong": wrong,
        BY_REQUEST: both[row, table.seconds.argmin(axis=1)],
        BY_ROUND: np.stack([by_round.rounds, by_round.seconds], axis=1),
    }


def expected(costs: dict[str, Floats], accuracy: float, miss: str) -> Floats:
    """Give the expected (rounds, seconds) of a router that is right with probability `accuracy`, else does `miss`."""
    return np.asarray(accuracy * costs[LABEL] + (1 - accuracy) * costs[miss])


def _levels(table: RequestTable, costs: dict[str, Floats], bootstrap: ClusterBootstrap) -> tuple[Level, ...]:
    names = (GENERALIST, LABEL, BY_REQUEST, BY_ROUND)
    return tuple(Level(name, *_worth(table, costs[name], bootstrap)) for name in names)


def _curve(
    table: RequestTable, costs: dict[str, Floats], accuracies: Sequence[float], bootstrap: ClusterBootstrap
) -> tuple[RouterPoint, ...]:
    return tuple(
        RouterPoint(
            p,
            *_worth(table, expected(costs, p, "wrong"), bootstrap),
            _worth(table, expected(costs, p, GENERALIST), bootstrap)[1],
        )
        for p in accuracies
    )


def _worth(table: RequestTable, cost: Floats, bootstrap: ClusterBootstrap) -> tuple[Estimate, Estimate]:
    """Give (tokens per round with bonus, speed-up over no speculation): ratios of sums over requests."""
    sums = np.column_stack([table.output_tokens - 1, cost[:, 0], table.plain_s, cost[:, 1]])
    tokens, speedup = bootstrap.estimates(lambda s: s[..., 0::2] / s[..., 1::2], sums)
    return tokens, speedup


def _gain(
    table: RequestTable, costs: dict[str, Floats], bootstrap: ClusterBootstrap, kept: np.ndarray
) -> tuple[Estimate, Estimate]:
    """Give (throughput of the label over the generalist's, break-even accuracy) on the requests `kept`.

    Seconds are linear in the accuracy p: p L + (1 - p) W = G at p = (W - G) / (W - L).
    """
    seconds = np.column_stack([costs[name][:, 1] for name in (GENERALIST, LABEL, "wrong")])

    def statistic(s: Floats) -> Floats:
        alone, right, wrong = np.moveaxis(s, -1, 0)
        return np.stack([alone / right, (wrong - alone) / (wrong - right)], axis=-1)

    gain, even = bootstrap.estimates(statistic, np.where(kept[:, None], seconds, 0.0))
    return gain, even


def _speed(
    table: RequestTable, specialists: Sequence[Student], label: np.ndarray, bootstrap: ClusterBootstrap
) -> tuple[SpeedRow, ...]:
    row = np.arange(len(label))
    sums = np.column_stack([table.plain_s, table.seconds[:, 0], table.seconds[row, label]])

    def statistic(s: Floats) -> Floats:
        plain, alone, own = np.moveaxis(s, -1, 0)
        return np.stack([plain / alone, plain / own, alone / own], axis=-1)

    rows = [SpeedRow(None, None, *bootstrap.estimates(statistic, np.where((label > 0)[:, None], sums, 0.0)))]
    rows += [
        SpeedRow(student.name, student.home, *bootstrap.estimates(statistic, sums, student.home))
        for student in specialists
    ]
    return tuple(rows)
