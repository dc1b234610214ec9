"""Every way to choose drafters on the same traffic: alone, by label, by classifier, by bandit, by oracle.

Bandits at batch 1, played on the table of requests and drafters: the simulator's own policies, request by request.

At batch 1 a request ends before the next begins, and its time depends on its drafter alone, so this gives what the
simulator gives (a test says so), a thousand times faster: many orders can be played.
"""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.common.bootstrap import Bounds, Candidates, ClusterBootstrap, Estimate, least, number
from analysis.routing.classifier import Guesses, cheapest
from analysis.routing.findings import BatchRow, GrowthPoint, MeanOverOrders, PolicyRow, Verdict
from analysis.routing.served import RequestTable, Server
from calibration.common.arrays import Floats, Ints
from simulator.drafter_routing.choice import (
    Choice,
    KernelUcb,
    Newcomer,
    SlidingUcb,
    ThompsonSampling,
    Ucb1,
    default_eta,
    kernel_matrix,
)
from simulator.drafter_routing.prompts import domain_contexts

Bandits = Mapping[str, Callable[[int], Choice]]
"""By name, what makes a bandit from a seed."""
KEEN = 0.1
"""Exploration that suits rewards which differ by a tenth, in the place of UCB1's sqrt(2) for rewards in [0, 1]."""


def bandits(table: RequestTable, window: int | None = None) -> Bandits:
    """Give the bandits of the simulator for the drafters of `table`; with `window` the one that forgets, too.

    PAK-UCB sees the domain label, not the tokens: on prompts that come again it would know each by heart.
    """
    arms = len(table.drafters)
    context_of, similarity = domain_contexts(table.domains)
    gram, eta = kernel_matrix(similarity, "poly"), default_eta(1000, arms, 0.05)
    found: dict[str, Callable[[int], Choice]] = {
        "ucb": lambda seed: Ucb1(arms, 2**0.5),
        f"ucb c={KEEN:g}": lambda seed: Ucb1(arms, KEEN),
        "thompson": lambda seed: ThompsonSampling(arms, seed),
        "pak_ucb": lambda seed: KernelUcb(arms, context_of, gram, 1.0, eta),
    }
    if window is not None:
        found[f"ucb c={KEEN:g}, last {window}"] = lambda seed: SlidingUcb(arms, KEEN, window)
    return found


def play(choice: Choice, table: RequestTable, order: Sequence[int]) -> Ints:
    """Give the drafter that `choice` takes for each request of `order`, one after the other at batch 1."""
    rates = table.rates.tolist()
    tokens = table.output_tokens.astype(int).tolist()
    arms = []
    for index, sequence in enumerate(order):
        arm = choice.choose(Newcomer(index, sequence, 0, tokens[sequence]))
        if tokens[sequence] > 1:  # what prefill ends has no round to learn from
            choice.learn(arm, sequence, rates[sequence][arm])
        arms.append(arm)
    return np.array(arms, dtype=np.int64)


def over_orders(samples: Floats) -> MeanOverOrders:
    """Give the mean of one number an order, two orders or more, with Student's t interval."""
    from scipy.stats import t

    orders = len(samples)
    mean = float(samples.mean())
    reach = float(t.ppf(0.975, orders - 1)) * float(samples.std(ddof=1)) / math.sqrt(orders)
    value, low, high = (number(x) or 0.0 for x in (mean, mean - reach, mean + reach))
    return MeanOverOrders(value, low, high, orders)


ORACLES = ("oracle by request", "oracle by round")
LABEL, CALIBRATED, NAIVE = "domain label", "calibrated classifier", "naive Bayes classifier"
ALWAYS = "always "
MERGED, WITH_LOOKUP = "merged drafts", "merged best and lookup"
"""Drafts of all drafters verified as one (TAPS), and of the best drafter with a model and a lookup that is free."""


def alone_seconds(
    table: RequestTable,
    server: Server,
    guesses: Guesses | None,
    merging: Mapping[str, Server],
    *,
    signals: bool,
    orders: int,
    seed: int,
) -> dict[str, Floats]:
    """Give the seconds of every request at batch 1 under every policy.

    Policies that choose by request are sums over the table: exact. The simulator's naive Bayes classifier, confidence
    routing (with `signals`), merged drafts (`merging`: servers of the drafters to merge) and the oracle by round are
    simulated. Bandits: the mean over `orders` shuffled passes, one pass each.
    """
    row, k = np.arange(len(table.ids)), table.draft_tokens
    found = {ALWAYS + name: table.seconds[:, i] for i, name in enumerate(table.drafters)}
    for name, chosen in assignments(table, guesses).items():
        found[name] = table.seconds[row, chosen]
    if guesses is not None:
        found[NAIVE] = server.serve({"policy": "classifier"}, k).seconds
    if signals:
        found["confidence"] = server.serve({"policy": "confidence"}, k).seconds
    for name, group in merging.items():
        found[name] = group.serve({"policy": "merged"}, k).seconds
    for name, make in bandits(table).items():
        total = np.zeros(len(row))
        for index in range(orders):
            order = np.random.default_rng([seed, index]).permutation(len(row))
            total[order] += table.seconds[order, play(make(index), table, order.tolist())]
        found[name] = total / orders
    found[ORACLES[0]] = table.seconds.min(axis=1)
    found[ORACLES[1]] = server.serve({"policy": "oracle_round", "by": "seconds"}, k).seconds
    return found


def assignments(table: RequestTable, guesses: Guesses | None) -> dict[str, Ints]:
    """Give the out-of-fold choices, by request: of the true label, and of the classifier."""
    if guesses is None:
        return {}
    given = (table.seconds, table.output_tokens)
    return {LABEL: cheapest(guesses, *given, certain=True), CALIBRATED: cheapest(guesses, *given)}


@dataclass(frozen=True)
class Contest:
    """Seconds of every request by policy on one traffic, and those of what the policies are compared with."""

    own: Mapping[str, Floats]
    against: Sequence[Floats]
    domain: str | None = None


def bounds_together(contests: Sequence[Contest], bootstrap: ClusterBootstrap) -> list[dict[str, Bounds]]:
    """Bounds of every policy's throughput over the best of what it is compared with, all contests at once.

    Whichever policy and traffic is picked, and whichever reference is truly the best: simultaneous bounds for all
    pairs, then the least over the references.
    """
    parts = []
    for contest in contests:
        count = len(contest.against)

        def ratios(s: Floats, count: int = count) -> Floats:
            pairs = s[..., None, :count] / s[..., count:, None]
            return np.asarray(pairs.reshape(*s.shape[:-1], -1))

        sums = np.column_stack([*contest.against, *contest.own.values()])
        parts.append(bootstrap.candidates(ratios, sums, contest.domain))
    bounds, found, at = Candidates.join(parts).simultaneous(), [], 0
    for contest in contests:
        mine = {}
        for name in contest.own:
            mine[name] = least(bounds[at : at + len(contest.against)])
            at += len(contest.against)
        found.append(mine)
    return found


def alike(seconds: Mapping[str, Floats], bootstrap: ClusterBootstrap) -> tuple[str, ...]:
    """Name the policies that an engine could run and that may have the highest throughput (`best_set`)."""
    fair = [name for name in seconds if name not in ORACLES]
    family = bootstrap.candidates(lambda s: 1 / s, np.column_stack([seconds[name] for name in fair]))
    return tuple(name for name, kept in zip(fair, family.best_set(), strict=True) if kept)


def policy_rows(
    table: RequestTable, seconds: Mapping[str, Floats], bootstrap: ClusterBootstrap, learning: Sequence[str]
) -> tuple[PolicyRow, ...]:
    """Give a row for each policy and traffic; `learning` policies learn from mixed traffic: that row alone.

    Verdicts on mixed traffic hold together, and so do those on all domains.
    """
    singles = [seconds[ALWAYS + name] for name in table.drafters]
    settled = {name: own for name, own in seconds.items() if name not in learning}
    rows: list[PolicyRow] = []
    for traffics, mine in (((None,), seconds), (bootstrap.domains, settled)):
        against = bounds_together([Contest(mine, singles, domain) for domain in traffics], bootstrap)
        plain = bounds_together([Contest(mine, [table.plain_s], domain) for domain in traffics], bootstrap)
        for domain, ratios, speedups in zip(traffics, against, plain, strict=True):
            rows += _traffic_rows(table, mine, domain, ratios, speedups, bootstrap)
    return tuple(rows)


def _traffic_rows(
    table: RequestTable,
    seconds: Mapping[str, Floats],
    domain: str | None,
    ratios: Mapping[str, Bounds],
    speedups: Mapping[str, Bounds],
    bootstrap: ClusterBootstrap,
) -> Iterator[PolicyRow]:
    labels = np.asarray(table.domains, dtype=object)
    mine = np.full(len(labels), True) if domain is None else labels == domain
    best = table.drafters[int(table.seconds[mine].sum(axis=0).argmin())]
    for name, own in seconds.items():
        sums = np.column_stack([table.plain_s, seconds[ALWAYS + best], seconds[ORACLES[0]], own])
        speedup, ratio, regret = bootstrap.estimates(
            lambda s: np.stack([s[..., 0] / s[..., 3], s[..., 1] / s[..., 3], s[..., 3] / s[..., 2] - 1], axis=-1),
            sums,
            domain,
        )
        together = with_bounds(ratio, ratios[name])
        yield PolicyRow(
            policy=name,
            domain=domain,
            best_single=best,
            speedup=speedup,
            speedup_together=with_bounds(speedup, speedups[name]),
            against_single=ratio,
            against_together=together,
            regret=regret,
            verdict=verdict(together),
            oracle=name in ORACLES,
        )


def batch_rows(
    server: Server,
    table: RequestTable,
    guesses: Guesses | None,
    merging: Mapping[str, Server],
    batches: Sequence[int],
    bootstrap: ClusterBootstrap,
    replications: int,
) -> tuple[BatchRow, ...]:
    """Simulate the policies on mixed traffic at `batches`; verdicts hold for all of them together."""
    if not batches:
        return ()
    played = [_batch_seconds(server, table, guesses, merging, batch, replications) for batch in batches]
    return judged_batches(table.drafters, dict(zip(batches, played, strict=True)), bootstrap, replications)


def _batch_seconds(
    server: Server,
    table: RequestTable,
    guesses: Guesses | None,
    merging: Mapping[str, Server],
    batch: int,
    replications: int,
) -> tuple[Floats, dict[str, Floats]]:
    """Seconds without speculation and under each policy, on the same orders; tables are replayed as ``assigned``."""
    k = table.draft_tokens
    first = {"policy": "static", "drafter": table.drafters[0]}
    plain = server.serve(first, 0, batch=batch, replications=replications)
    rules: dict[str, dict[str, Any]] = {
        ALWAYS + name: {"policy": "static", "drafter": name} for name in table.drafters
    }
    if guesses is not None:
        rules[NAIVE] = {"policy": "classifier"}
    rules |= {name: {"policy": name} for name in ("ucb", "thompson")}
    rules[ORACLES[0]] = {"policy": "oracle_request", "by": "seconds"}
    rules[ORACLES[1]] = {"policy": "oracle_round", "by": "seconds"}
    seconds: dict[str, Floats] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for index, (name, chosen) in enumerate(assignments(table, guesses).items()):
            write_assigned(folder / f"{index}.csv", table.ids, [table.drafters[arm] for arm in chosen.tolist()])
            rules[name] = {"policy": "assigned", "path": f"{index}.csv"}
        for name, rule in rules.items():
            run = server.serve(rule, k, batch=batch, replications=replications, folder=folder)
            seconds[name] = run.seconds
    for name, group in merging.items():
        run = group.serve({"policy": "merged"}, k, batch=batch, replications=replications)
        seconds[name] = run.seconds
    return plain.seconds, seconds


def judged_batches(
    drafters: Sequence[str],
    played: Mapping[int, tuple[Floats, Mapping[str, Floats]]],
    bootstrap: ClusterBootstrap,
    replications: int,
) -> tuple[BatchRow, ...]:
    """Give the rows of all batch sizes from seconds without speculation and under each policy."""
    singles = [ALWAYS + name for name in drafters]
    contests = [Contest(seconds, [seconds[name] for name in singles]) for _, seconds in played.values()]
    rows = []
    for (batch, (plain, seconds)), bounds in zip(played.items(), bounds_together(contests, bootstrap), strict=True):
        best = min(singles, key=lambda name: float(seconds[name].sum()))
        for name, own in seconds.items():
            sums = np.column_stack([plain, seconds[best], own])
            speedup, ratio = bootstrap.estimates(lambda s: s[..., :2] / s[..., 2:], sums)
            together = with_bounds(ratio, bounds[name])
            rows.append(
                BatchRow(
                    policy=name,
                    batch=batch,
                    replications=replications,
                    speedup=speedup,
                    against_single=ratio,
                    against_together=together,
                    verdict=verdict(together),
                    oracle=name in ORACLES,
                )
            )
    return tuple(rows)


def write_assigned(path: Path, ids: Sequence[str], drafters: Sequence[str]) -> None:
    """Write the table that ``routing.drafter policy = "assigned"`` reads."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("sequence_id", "drafter"))
        writer.writerows(zip(ids, drafters, strict=True))


def regret_growth(
    table: RequestTable, requests: int, orders: int, points: int, *, seed: int
) -> tuple[GrowthPoint, ...]:
    """Play the bandits for `requests` requests, passes over the prompts each newly shuffled; regret at `points`."""
    number = len(table.ids)
    over = table.seconds - table.seconds.min(axis=1, keepdims=True)
    streams = [
        np.concatenate([rng.permutation(number) for _ in range(-(-requests // number))])[:requests]
        for rng in (np.random.default_rng([seed, 1, index]) for index in range(orders))
    ]
    grown = []
    marks = np.linspace(0, requests, points + 1).round().astype(int)[1:].tolist()
    for name, make in bandits(table).items():
        paths = np.stack(
            [np.cumsum(over[order, play(make(i), table, order.tolist())]) for i, order in enumerate(streams)]
        )
        grown += [GrowthPoint(name, mark, over_orders(paths[:, mark - 1])) for mark in marks]
    best = int(table.seconds.sum(axis=0).argmin())
    still = np.stack([np.cumsum(over[order, best]) for order in streams])
    name = ALWAYS + table.drafters[best]
    return (*grown, *(GrowthPoint(name, mark, over_orders(still[:, mark - 1])) for mark in marks))


def with_bounds(value: Estimate, bounds: Bounds) -> Estimate:
    """Give the same value with other bounds."""
    low, high = bounds
    return replace(value, low=low, high=high)


def verdict(ratio: Estimate) -> Verdict:
    """Say whether the interval of a throughput over the best single drafter's leaves out 1."""
    if ratio.low is not None and ratio.low > 1:
        return "beats it"
    if ratio.high is not None and ratio.high < 1:
        return "loses to it"
    return "cannot tell apart"
