"""What a router of given accuracy is worth, from the table of every request with every drafter at batch 1.

Which drafter is the generalist and which are specialists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.common.bootstrap import ClusterBootstrap, Estimate, number
from analysis.knowledge.findings import Level, RouterPoint, RouterValue, SpeedRow, Student
from analysis.routing.served import Priced, RequestTable, Served, Server
from calibration.common.arrays import Floats
from calibration.common.errors import ReplayError, did_you_mean
from calibration.traces import DrafterInfo, TraceSet


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
