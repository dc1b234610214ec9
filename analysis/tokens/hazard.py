"""Accepted length as a survival time: the hazard of rejection by depth, and why it is not constant.

A round survives depth d when its d-th drafted token is accepted; it is censored where the draft or the text ends.
If every token were accepted independently at one rate the hazard would be constant and the accepted length
geometric (Leviathan et al. 2023). A hazard that falls with depth may come from prompts that differ (frailty), from
easy and hard stretches within them, or from rounds that start after a rejection, in hard text.

Hazard by depth when prompts differ: a logistic hazard with a normal effect of every prompt.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, log_expit, logsumexp, stdtrit

from analysis.common.bootstrap import LEVEL, ClusterBootstrap, Estimate, number
from analysis.common.rounds import RoundSums, recording, replay_rounds
from analysis.tokens.rows import TokenRows
from calibration.common.arrays import Floats
from calibration.common.errors import ConvergenceWarning, ReplayError, ReportError
from calibration.traces import TraceSet

_NODES = np.linspace(-5.0, 5.0, 201)
_MASS = -0.5 * _NODES**2 - logsumexp(-0.5 * _NODES**2)
"""Log weights of the standard normal on a grid fine enough for prompts of thousands of rounds."""


def frailty_trend(risk: Floats, accepted: Floats) -> tuple[Estimate, float] | None:
    """Give the change of the log-odds of rejection per depth within a prompt, and the spread of prompts.

    logit h(d | prompt) = a + b d + s z, z ~ N(0, 1) for each prompt (discrete-time frailty, Vaupel et al. 1979, in
    logistic form); maximum likelihood, z integrated out on a grid; the interval from the sandwich covariance over
    prompts, Student's t. Effects fitted prompt by prompt instead would be biased towards a rising hazard (the
    selection of streaks, Miller and Sanjurjo 2018). `risk` and `accepted` are counts (prompts, depths). None, with a
    `ConvergenceWarning`, where the search fails.
    """
    from scipy.optimize import minimize
    from statsmodels.tools.numdiff import approx_fprime, approx_hess

    depth = np.arange(risk.shape[1], dtype=np.float64)[:, None]
    rejected = risk - accepted

    def by_prompt(p: Floats) -> Floats:
        linear = p[0] + p[1] * depth + np.exp(p[2]) * _NODES
        return np.asarray(logsumexp(rejected @ log_expit(linear) + accepted @ log_expit(-linear) + _MASS, axis=1))

    def loss(p: Floats) -> float:
        return -float(by_prompt(np.clip(p, -30, 30)).sum())

    rate = np.clip(rejected.sum() / risk.sum(), 1e-4, 1 - 1e-4)
    start = np.array([np.log(rate / (1 - rate)), 0.0, -1.0])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the numbers are read below
        found = minimize(loss, start, method="BFGS").x
        if found[2] < -4:  # prompts do not differ: the effect is none, and its logarithm has no bottom
            return _without(rejected, accepted, risk)
        bread = approx_hess(found, lambda p: -by_prompt(p).sum())
        scores = np.asarray(approx_fprime(found, by_prompt, centered=True))
        variance = np.diag(np.linalg.pinv(bread) @ scores.T @ scores @ np.linalg.pinv(bread))
    if not (np.isfinite(found).all() and np.isfinite(variance).all() and variance[1] > 0):
        warnings.warn("hazard by depth: the frailty fit did not converge", ConvergenceWarning, stacklevel=2)
        return None
    return _estimate(float(found[1]), float(variance[1]) ** 0.5, len(risk)), number(float(np.exp(found[2]))) or 0.0


def _without(rejected: Floats, accepted: Floats, risk: Floats) -> tuple[Estimate, float]:
    """The trend with no spread of prompts: a plain logistic regression, by Newton's method, sandwich over prompts."""
    depth = np.arange(risk.shape[1], dtype=np.float64)
    x = np.stack([np.ones_like(depth), depth], axis=1)
    b = np.zeros(2)
    for _ in range(50):
        h = expit(x @ b)
        bread = np.einsum("pd,d,di,dj->ij", risk, h * (1 - h), x, x)
        step = np.linalg.solve(bread, ((rejected - risk * h) @ x).sum(axis=0))
        b = b + step
    h = expit(x @ b)
    scores = (rejected - risk * h) @ x
    inverse = np.linalg.inv(np.einsum("pd,d,di,dj->ij", risk, h * (1 - h), x, x))
    return _estimate(float(b[1]), float((inverse @ scores.T @ scores @ inverse)[1, 1]) ** 0.5, len(risk)), 0.0


def _estimate(value: float, error: float, prompts: int) -> Estimate:
    reach = error * float(stdtrit(max(prompts - 1, 1), (1 + LEVEL) / 2))
    return Estimate(number(value), number(value - reach), number(value + reach), prompts)


FEWEST_AT_RISK = 20
"""Drafts that must have reached a depth for it to enter."""


@dataclass(frozen=True)
class HazardPoint:
    """Depth d of one drafter's rounds.

    ``hazard``: P(draft d rejected | those before accepted); ``at_risk``: drafts compared there. ``survival``:
    P(accepted length >= d), bonus not included (Kaplan and Meier 1958); ``geometric`` the same at the constant
    hazard.
    """

    depth: int
    hazard: Estimate
    at_risk: float
    survival: Estimate
    geometric: float


@dataclass(frozen=True)
class Trend:
    """Change of the log-odds of rejection per depth, 95% interval (clustered by prompt): 0 is a constant hazard.

    ``within_prompts`` has a random effect of every prompt (see `frailty_trend`), ``prompt_sd`` its standard deviation
    in log-odds; ``given_confidence`` has the drafter's confidence and entropy in the model instead.
    """

    marginal: Estimate
    within_prompts: Estimate
    prompt_sd: float
    given_confidence: Estimate | None


@dataclass(frozen=True)
class HazardCurve:
    """Hazard and survival of one drafter.

    ``constant`` is the maximum-likelihood constant hazard. ``p_value`` tests that the hazard is the same at every
    depth (Wald, covariance clustered by prompt), ``adjusted`` is it after Holm's correction over the drafters; None
    where the test cannot be made. ``mean_accepted`` (bonus not included, sum of the survival up to the draft length)
    and ``geometric_accepted`` compare the yield of a round with that of the constant hazard. ``trend`` tells whether
    prompts that differ explain the fall.
    """

    drafter: str
    points: tuple[HazardPoint, ...]
    constant: Estimate
    wald: float | None
    freedom: int
    p_value: float | None
    adjusted: float | None
    mean_accepted: Estimate
    geometric_accepted: float
    trend: Trend | None

    @property
    def verdict(self) -> str:
        """Whether the hazard is constant: `falls`, `rises`, `varies`, `constant` (not told from it) or `untested`."""
        if self.adjusted is None:
            return "untested"
        if self.adjusted > 1 - LEVEL:
            return "constant"
        slope = self.trend.marginal if self.trend else None
        if slope is not None and slope.high is not None and slope.high < 0:
            return "falls"
        return "rises" if slope is not None and slope.low is not None and slope.low > 0 else "varies"

    @property
    def explained(self) -> str | None:
        """What the trend comes from, as far as the fits tell; None where there is no trend to explain.

        `prompts`: within prompts the interval holds 0; `confidence`: within prompts it does not, given confidence and
        entropy it does; `neither`: it stays.
        """
        if self.verdict not in ("falls", "rises") or self.trend is None:
            return None
        if _holds_zero(self.trend.within_prompts):
            return "prompts"
        given = self.trend.given_confidence
        return "confidence" if given is not None and _holds_zero(given) else "neither"


def kaplan_meier(at_risk: Floats, accepted: Floats) -> Floats:
    """P(accepted length >= d), d = 1, 2, ...: the product of accepted / at risk up to d (Kaplan and Meier 1958).

    Both (..., depths); undefined (NaN) from the first depth that no draft reached.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.cumprod(accepted / at_risk, axis=-1))


def hazard_curves(
    traces: TraceSet, draft_tokens: int, bootstrap: ClusterBootstrap, rows: TokenRows | None = None
) -> tuple[HazardCurve, ...]:
    """Give the hazard of every drafter over rounds that draft `draft_tokens` (or as many as it can).

    Exact for greedy traces, expected counts for sampled ones. `rows`, where given, serve the trend at given
    confidence. Raises `ReportError` where no drafter can be replayed.
    """
    found = []
    for name in traces.manifest.drafter_names:
        recorded_limit = traces.manifest.drafter(name).max_draft_tokens
        try:
            rounds = replay_rounds(recording(traces, name), min(draft_tokens, recorded_limit or draft_tokens))
        except ReplayError:
            continue
        if rounds.at_risk[:, 0].sum() >= FEWEST_AT_RISK:
            found.append(_curve(name, rounds, bootstrap, _rows_of(rows, name)))
    if not found:
        raise ReportError("hazard: needs a drafter whose rounds can be replayed, got none")
    return _adjusted(found)


def _rows_of(rows: TokenRows | None, drafter: str) -> TokenRows | None:
    if rows is None:
        return None
    mine = rows.take(rows.drafter == rows.drafters.index(drafter))
    return mine if len(mine) else None


def _curve(name: str, rounds: RoundSums, bootstrap: ClusterBootstrap, rows: TokenRows | None) -> HazardCurve:
    reached = rounds.at_risk.sum(axis=0) >= FEWEST_AT_RISK
    depths = int(np.argmin(reached)) if not reached.all() else len(reached)
    risk, accepted = rounds.at_risk[:, :depths], rounds.accepted_at[:, :depths]
    sums = np.concatenate([risk, accepted], axis=1)

    def statistic(s: Floats) -> Floats:
        r, a = np.split(s, 2, axis=-1)
        alive = kaplan_meier(r, a)
        total = 1 - a.sum(axis=-1, keepdims=True) / r.sum(axis=-1, keepdims=True)
        return np.concatenate([1 - a / r, alive, total, alive.sum(axis=-1, keepdims=True)], axis=-1)

    found = bootstrap.estimates(statistic, sums)
    constant, mean = found[-2], found[-1]
    kept = 1 - (constant.value or 0.0)
    wald, freedom, p = _constancy(risk, accepted)
    points = tuple(
        HazardPoint(
            d + 1,
            found[d].bounded(int(np.count_nonzero(risk[:, d]))),
            round(float(risk[:, d].sum()), 2),
            found[depths + d],
            number(kept ** (d + 1)) or 0.0,
        )
        for d in range(depths)
    )
    geometric = number(float(sum(kept ** (d + 1) for d in range(depths)))) or 0.0
    trend = _trend(risk, accepted, rows) if depths > 1 else None
    return HazardCurve(
        drafter=name,
        points=points,
        constant=constant,
        wald=wald,
        freedom=freedom,
        p_value=p,
        adjusted=None,
        mean_accepted=mean,
        geometric_accepted=geometric,
        trend=trend,
    )


def _constancy(risk: Floats, accepted: Floats) -> tuple[float | None, int, float | None]:
    """Wald test that the log-odds of rejection are the same at every depth that sees both fates."""
    both = (accepted.sum(axis=0) > 0) & ((risk - accepted).sum(axis=0) > 0)
    used = np.flatnonzero(both)
    if len(used) < 2:
        return None, 0, None
    depth = np.broadcast_to(np.arange(len(used)), (len(risk), len(used)))
    x = np.concatenate(
        [np.ones((risk[:, used].size, 1)), (depth.ravel()[:, None] == np.arange(1, len(used))).astype(float)], axis=1
    )
    fit = _clustered(risk[:, used], accepted[:, used], x)
    if fit is None:
        return None, len(used) - 1, None
    test = fit.wald_test(np.eye(len(used))[1:], use_f=False, scalar=True)
    return number(float(test.statistic)), len(used) - 1, number(float(test.pvalue))


def _trend(risk: Floats, accepted: Floats, rows: TokenRows | None) -> Trend | None:
    depth = np.broadcast_to(np.arange(risk.shape[1], dtype=np.float64), risk.shape)
    marginal = _slope(_clustered(risk, accepted, np.stack([np.ones(risk.size), depth.ravel()], axis=1)), 1, len(risk))
    found = frailty_trend(risk, accepted)
    if marginal is None or found is None:
        return None
    return Trend(marginal, *found, None if rows is None else _given_confidence(rows))


def _given_confidence(rows: TokenRows) -> Estimate | None:
    """Trend with confidence, its log-odds and entropy in the model, token by token."""
    felt = np.clip(rows.numeric[:, 0], 1e-4, 1 - 1e-4)
    x = np.stack(
        [rows.numeric[:, 3], np.ones(len(rows)), felt, np.log(felt / (1 - felt)), rows.numeric[:, 1]], axis=1
    )
    hit = rows.accepted.astype(float)
    if len(np.unique(rows.numeric[:, 3])) < 2 or len(np.unique(hit)) < 2:
        return None
    prompts = len(np.unique(rows.prompt))
    return _slope(_logistic(np.stack([1 - hit, hit], axis=1), x, rows.prompt), 0, prompts)


def _clustered(risk: Floats, accepted: Floats, x: Floats) -> Any | None:
    """Logistic regression of rejection by (prompt, depth), counts as they are, covariance clustered by prompt."""
    prompt = np.repeat(np.arange(len(risk)), risk.shape[1])
    return _logistic(np.stack([(risk - accepted).ravel(), accepted.ravel()], axis=1), x, prompt)


def _logistic(counts: Floats, x: Floats, prompt: Any) -> Any | None:
    """Fit to (rejected, accepted) counts; None, with a `ConvergenceWarning`, where there is no usable fit."""
    import statsmodels.api as sm

    used = counts.sum(axis=1) > 1e-9
    groups = np.unique(np.asarray(prompt)[used], return_inverse=True)[1]
    if groups.max(initial=0) < 1:
        return None
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the flag and the numbers are read below
        fit = sm.GLM(counts[used], x[used], family=sm.families.Binomial()).fit(
            cov_type="cluster", cov_kwds={"groups": groups}
        )
    if not fit.converged or not np.isfinite(fit.bse).all():
        warnings.warn("hazard by depth: a logistic fit did not converge", ConvergenceWarning, stacklevel=2)
        return None
    return fit


def _slope(fit: Any | None, column: int, prompts: int) -> Estimate | None:
    if fit is None:
        return None
    value = float(fit.params[column])
    reach = float(fit.bse[column]) * float(stdtrit(max(prompts - 1, 1), (1 + LEVEL) / 2))
    return Estimate(number(value), number(value - reach), number(value + reach), prompts)


def _holds_zero(estimate: Estimate) -> bool:
    return estimate.low is None or estimate.high is None or estimate.low <= 0 <= estimate.high


def _adjusted(curves: Sequence[HazardCurve]) -> tuple[HazardCurve, ...]:
    """Holm's correction over the drafters that could be tested."""
    from statsmodels.stats.multitest import multipletests

    tested = [c.p_value for c in curves if c.p_value is not None]
    corrected = iter(multipletests(tested, method="holm")[1].tolist() if tested else [])
    return tuple(c if c.p_value is None else dataclasses.replace(c, adjusted=number(next(corrected))) for c in curves)
