"""Hazard by depth when prompts differ: a logistic hazard with a normal effect of every prompt."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.special import expit, log_expit, logsumexp, stdtrit

from analysis.common.bootstrap import LEVEL, Estimate, number
from calibration.common.arrays import Floats
from calibration.common.errors import ConvergenceWarning

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
