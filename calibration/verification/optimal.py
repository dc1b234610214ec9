"""The optimum over all rules: how often one of k drafts can be accepted at most, and rules that attain it.

SpecTr's k-sequential selection: independent drafts, each held to the same lowered bar.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CalibrationError
from calibration.verification.common import (
    Drafting,
    Drafts,
    Law,
    Sampled,
    choice,
    draft_count,
    draft_tokens,
    norm,
    pair,
    residual,
)
from calibration.verification.gumbel import draw_drafts, draw_iid, split_top
from calibration.verification.race import prefix_probabilities


@dataclass(frozen=True)
class KSequential(Sampled):
    """Accept x_i ~ q with probability min(1, p(x_i) / (g q(x_i))) at each of k independent drafts (K-SEQ).

    With beta(g) = sum min(q, p / g), one is accepted with probability alpha = 1 - (1 - beta)^k; all rejected: emit
    from norm(p - min(q, p / g) alpha / beta). Lossless for every g with alpha <= g beta; used is the smallest,
    g* in [1, k] (`division_factor`), where alpha = sum min(g* q, p). At least 1 - 1/e of the optimum.
    Replay: exact in distribution from p and q at the target's path (T2): accept y_t with probability
    acceptance_by_token(p, q, k)[y_t] / p[y_t]. Sun et al. 2023 (SpecTr; its p and q are swapped).
    """

    drafting: ClassVar[Drafting] = "iid"
    lossless: ClassVar[bool] = True

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw k independent drafts from q [V]."""
        return draw_iid(q, k, rng)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give alpha, exact; O(V) at each of about 50 bisections."""
        p, q = pair(p, q, "KSequential.acceptance")
        k = draft_count(k, "KSequential.acceptance")
        return _accepted(_beta(p, q, _factor(p, q, k)), k)

    def acceptance_by_token(self, p: ArrayLike, q: ArrayLike, k: int) -> Floats:
        """Give [V] the mass accepted via each token, min(q, p / g*) alpha / beta."""
        p, q = pair(p, q, "KSequential.acceptance")
        k = draft_count(k, "KSequential.acceptance")
        return _mass(p, q, _factor(p, q, k), k)

    def law(self, p: ArrayLike, q: ArrayLike, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [k], all k of one draw: g* depends on k."""
        p, q = pair(p, q, "KSequential.law")
        tokens = draft_tokens(drafts, q, "KSequential.law")
        factor = _factor(p, q, tokens.size)
        chance = np.minimum(1.0, p[tokens] / (factor * q[tokens]))
        reached = np.concatenate([[1.0], np.cumprod(1.0 - chance)[:-1]])
        left = np.maximum(p - _mass(p, q, factor, tokens.size), 0.0)
        return Law(tokens, reached * chance, norm(left, p))


def division_factor(p: ArrayLike, q: ArrayLike, k: int) -> float:
    """Give g*, the smallest g in [1, k] with 1 - (1 - beta(g))^k <= g beta(g), by bisection to rounding."""
    checked_p, checked_q = pair(p, q, "division_factor")
    return _factor(checked_p, checked_q, draft_count(k, "division_factor"))


def _beta(p: Floats, q: Floats, factor: float) -> float:
    return min(1.0, float(np.minimum(q, p / factor).sum()))


def _accepted(beta: float, k: int) -> float:
    """Give 1 - (1 - beta)^k without cancellation."""
    return 1.0 if beta >= 1.0 else float(-np.expm1(k * np.log1p(-beta)))


def _factor(p: Floats, q: Floats, k: int) -> float:
    """Bisect for g*; the upper end is kept, where the rule is valid."""

    def valid(factor: float) -> bool:
        beta = _beta(p, q, factor)
        return _accepted(beta, k) <= factor * beta

    low, high = 1.0, float(k)
    if valid(low):
        return low
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return high
        if valid(middle):
            high = middle
        else:
            low = middle


def _mass(p: Floats, q: Floats, factor: float, k: int) -> Floats:
    """Give [V] the mass accepted via each token."""
    share = np.minimum(q, p / factor)
    beta = min(1.0, float(share.sum()))
    return share * (_accepted(beta, k) / beta) if beta > 0 else share


MOST_TUPLES = 50_000
"""How many draft tuples `optimal_coupling` enumerates before it refuses."""
TOLERANCES: Any = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
"""What the solver of the linear program is held to; the tightest that it takes."""


@dataclass(frozen=True)
class OptimalTransport(Sampled):
    """Couple the drafts with y ~ p so that y is among them as often as any lossless rule allows.

    `drafting`: "iid" or "without_replacement". `acceptance` is the optimum for any vocabulary; `law` and `verify`
    solve a linear program over all draft sets, for small vocabularies only (`optimal_coupling`). They are lossless to
    rounding and optimal to the solver's tolerance (better than 1e-7). There is no acceptance_by_token: optimal
    couplings differ in it. Replay: exact in distribution from p and q at every position (T2), drafts redrawn.
    Sun et al. 2023 (SpecTr, the program); Hu et al. 2025 (its dual and the prefixes).
    """

    drafting: Drafting = "iid"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse an unknown way of drafting."""
        choice("drafting", self.drafting, ("iid", "without_replacement"), "OptimalTransport")

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw up to k drafts from q [V]."""
        return draw_drafts(q, k, rng, self.drafting)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give the optimal probability that one of k drafts is accepted, exact.

        min over H of p(H) + 1 - P(all k drafts in H), attained by a prefix H of the tokens sorted by falling q / p.
        iid: O(V log V). Without replacement: O(V log V) for k <= 2; beyond, a numerical integral of O(V k) at each of
        about 50 times (about 1e-12).
        """
        p, q = pair(p, q, "OptimalTransport.acceptance")
        k = draft_count(k, "OptimalTransport.acceptance")
        order = by_ratio(p, q)
        if self.drafting == "iid":
            inside = np.concatenate([[0.0], np.minimum(1.0, np.cumsum(q[order]))]) ** k
        else:
            inside = prefix_probabilities(q, k, order)
        cut = np.concatenate([[0.0], np.cumsum(p[order])]) + (1.0 - inside)
        return float(min(1.0, max(0.0, cut.min())))

    def law(self, p: ArrayLike, q: ArrayLike, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [k] under one optimal coupling; small vocabularies only."""
        p, q = pair(p, q, "OptimalTransport.law")
        distinct = self.drafting == "without_replacement"
        tokens = draft_tokens(drafts, q, "OptimalTransport.law", distinct=distinct)
        return _coupling(p.tobytes(), q.tobytes(), tokens.size, self.drafting).law(tokens)


def by_ratio(p: Floats, q: Floats) -> Ints:
    """Give the tokens [V] by falling q / p; those without q last."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(q > 0, q / p, 0.0)
    return np.argsort(-ratio, kind="stable")


@dataclass(frozen=True, eq=False)
class Coupling:
    """An optimal coupling: for each set of drafts its probability and the mass accepted via each of its tokens."""

    p: Floats
    chances: dict[tuple[int, ...], float]
    """The probability of each draft set (sorted distinct tokens)."""
    flows: dict[tuple[int, ...], dict[int, float]]
    """For each draft set, the mass accepted via each token in it."""

    @property
    def acceptance(self) -> float:
        """The probability that one of the drafts is accepted."""
        return sum(sum(flow.values()) for flow in self.flows.values())

    @property
    def accepted_by_token(self) -> Floats:
        """The mass [V] accepted via each token under this coupling."""
        mass = np.zeros_like(self.p)
        for flow in self.flows.values():
            for token, value in flow.items():
                mass[token] += value
        return mass

    def law(self, tokens: Ints) -> Law:
        """Give the consequence for drafts [k], in any order; of equal drafts the first counts."""
        key = tuple(sorted(set(tokens.tolist())))
        accepted = np.zeros(tokens.size)
        for token, value in self.flows[key].items():
            accepted[np.flatnonzero(tokens == token)[0]] = value / self.chances[key]
        return Law(tokens, accepted, norm(np.maximum(self.p - self.accepted_by_token, 0.0), self.p))


def optimal_coupling(p: ArrayLike, q: ArrayLike, k: int, drafting: Drafting = "iid") -> Coupling:
    """Solve the transport program of SpecTr for p, q [V] and k drafts: small vocabularies only (V^k <= MOST_TUPLES).

    Maximise the accepted mass f(S, y), y in S, with sum_y f(S, y) <= P(S) and sum_S f(S, y) <= p(y). The solver's
    rounding is removed by scaling f into these bounds, so that the coupling is lossless to float rounding.
    """
    checked_p, checked_q = pair(p, q, "optimal_coupling")
    choice("drafting", drafting, ("iid", "without_replacement"), "optimal_coupling")
    return _coupling(checked_p.tobytes(), checked_q.tobytes(), draft_count(k, "optimal_coupling"), drafting)


# NOTE: cached, because summing a law over all draft tuples asks for the same program once a tuple.
@lru_cache(maxsize=32)
def _coupling(p_bytes: bytes, q_bytes: bytes, k: int, drafting: Drafting) -> Coupling:
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    p = np.frombuffer(p_bytes)
    chances = _set_chances(np.frombuffer(q_bytes), k, drafting)
    edges = [(row, token) for row, drafts in enumerate(chances) for token in drafts]
    rows = [row for row, _ in edges] + [len(chances) + token for _, token in edges]
    columns = 2 * list(range(len(edges)))
    matrix: Any = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(chances) + p.size, len(edges)))
    bounds = np.concatenate([list(chances.values()), p])
    solved = linprog(-np.ones(len(edges)), A_ub=matrix, b_ub=bounds, method="highs", options=TOLERANCES)
    if not solved.success:
        raise CalibrationError(f"optimal_coupling: the linear program must have a solution, got {solved.message}")
    flow: Floats = np.maximum(np.asarray(solved.x), 0.0)
    used = matrix @ flow
    scale = np.minimum(1.0, np.divide(bounds, used, out=np.ones_like(used), where=used > 0))
    flow = flow * np.minimum(scale[rows[: len(edges)]], scale[rows[len(edges) :]])
    flows: dict[tuple[int, ...], dict[int, float]] = {drafts: {} for drafts in chances}
    keys = list(chances)
    for (row, token), value in zip(edges, flow.tolist(), strict=True):
        flows[keys[row]][token] = value
    return Coupling(p, chances, flows)


def _set_chances(q: Floats, k: int, drafting: Drafting) -> dict[tuple[int, ...], float]:
    """Give the probability of each set of distinct tokens that k draws from q can hold."""
    support = np.flatnonzero(q).tolist()
    k = k if drafting == "iid" else min(k, len(support))
    if len(support) ** k > MOST_TUPLES:
        raise CalibrationError(
            f"optimal_coupling: V^k must stay below {MOST_TUPLES:,} draft tuples, got {len(support)}^{k}; "
            "OptimalTransport.acceptance needs no coupling"
        )
    tuples = product(support, repeat=k) if drafting == "iid" else permutations(support, k)
    chances: dict[tuple[int, ...], float] = {}
    for drafts in tuples:
        rest, chance = q.copy(), 1.0
        for token in drafts:
            chance *= rest[token] / rest.sum()
            if drafting == "without_replacement":
                rest[token] = 0.0
        key = tuple(sorted(set(drafts)))
        chances[key] = chances.get(key, 0.0) + float(chance)
    return chances


@dataclass(frozen=True)
class GreedyDrafts(Sampled):
    """Draft the k - 1 most probable tokens of q and one x drawn from the rest; verify them optimally.

    With q' = norm(q outside the top): accept x with probability min(1, p(x) / q'(x)), otherwise emit z from
    norm(p - min(p, q') outside the top), which counts as an accepted draft when it lies in the top. Lossless, and the
    optimum for drafts made this way; whether it beats random drafts depends on how well q is ordered by p. Any V.
    Replay: exact in distribution from p and q at the target's path (T2): accept y_t with probability
    acceptance_by_token(p, q, k)[y_t] / p[y_t]. Hu et al. 2025.
    """

    drafting: ClassVar[Drafting] = "greedy"
    lossless: ClassVar[bool] = True

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Give the k - 1 most probable tokens of q [V], then one drawn from the others where there are any."""
        return draw_drafts(q, k, rng, self.drafting)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give p(top) + sum of min(p, q') outside it, exact; O(V)."""
        return min(1.0, float(self.acceptance_by_token(p, q, k).sum()))

    def acceptance_by_token(self, p: ArrayLike, q: ArrayLike, k: int) -> Floats:
        """Give [V] the mass accepted via each token: p in the top, min(p, q') outside it."""
        p, q = pair(p, q, "GreedyDrafts.acceptance")
        top, rest = split_top(q, draft_count(k, "GreedyDrafts.acceptance"))
        accepted = np.minimum(p, rest)
        accepted[top] = p[top]
        return accepted

    def law(self, p: ArrayLike, q: ArrayLike, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [k] as `draw` orders them; O(V)."""
        p, q = pair(p, q, "GreedyDrafts.law")
        tokens = draft_tokens(drafts, q, "GreedyDrafts.law", distinct=True)
        top, rest = split_top(q, tokens.size)
        if set(tokens[:-1].tolist()) != set(top.tolist()):
            raise CalibrationError(
                f"GreedyDrafts.law: drafts must be the top of q, {top.tolist()}, and one more, got {tokens.tolist()}"
            )
        last = tokens[-1]
        chance = min(1.0, p[last] / rest[last])
        emitted = residual(p, rest)
        accepted = np.append((1.0 - chance) * emitted[tokens[:-1]], chance)
        missed = emitted.copy()
        missed[tokens[:-1]] = 0.0
        return Law(tokens, accepted, norm(missed, emitted))
