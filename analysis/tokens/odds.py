"""Acceptance of a drafted token as a logistic regression: odds ratios with intervals that respect the clustering.

Three fits of one model. *Exchangeable*: generalised estimating equations (Liang and Zeger 1986) clustered by prompt,
with one correlation between any two tokens of a prompt, drafters as fixed effects, robust covariance; on a thinned
sample, since with thousands of tokens a prompt its iteration is unstable. *Independence*: the same equations on every
row with independence as the working correlation, the covariance robust all the same. *Mixed*: random intercepts by
prompt and by drafter (Laplace approximation, statsmodels `BinomialBayesMixedGLM`); its ratios are within a prompt and
a drafter, and farther from 1 than the population-averaged ones of the first two.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy.special import stdtrit

from analysis.common.bootstrap import LEVEL, Estimate, number
from analysis.tokens.rows import NUMERIC, TokenRows
from calibration.common.arrays import Floats
from calibration.common.errors import ConvergenceWarning

EXCHANGEABLE_ROWS = 6_000
"""Rows of the exchangeable fit: about a hundred a prompt, where its iteration is stable."""

MIXED_ROWS = 40_000
VARIATIONAL_ROWS = 6_000

_RUNAWAY = 50.0
"""A coefficient, or its error, beyond this in log-odds has no maximum: the feature separates the fates."""

_COLLAPSED = -10.0
"""Log standard deviation of a random effect below which the joint mode has run off to none at all."""


@dataclass(frozen=True)
class OddsRatio:
    """Ratio of the odds of acceptance for one step of a feature, by fit; None where that fit has none.

    ``feature`` is a name of `NUMERIC`, ``domain NAME`` or ``drafter NAME``; ``step`` says what the ratio is for: one
    standard deviation of the feature, or this one against the reference.
    """

    feature: str
    step: str
    exchangeable: Estimate | None
    independence: Estimate | None
    mixed: Estimate | None


@dataclass(frozen=True)
class Regression:
    """The regression in its three fits.

    ``correlation`` is that between two tokens of one prompt (exchangeable fit). ``prompt_sd`` and ``drafter_sd`` are
    the standard deviations of the random effects in log-odds. ``rows`` by fit; ``troubles`` names every fit that did
    not converge or had to be replaced, empty if all went well. ``mixed_by`` is `Laplace` or `variational`.
    """

    rows: dict[str, int]
    prompts: int
    ratios: tuple[OddsRatio, ...]
    correlation: float | None
    prompt_sd: float | None
    drafter_sd: float | None
    mixed_by: str | None
    troubles: tuple[str, ...]

    def ratio(self, feature: str) -> OddsRatio:
        """Give the odds ratio of `feature`. Raises `KeyError` where the regression has none."""
        return {each.feature: each for each in self.ratios}[feature]


@dataclass(frozen=True)
class Design:
    """Columns of a regression: their names, their values (rows, columns) and what one step of each is."""

    names: tuple[str, ...]
    values: Floats
    steps: tuple[str, ...]


def design(rows: TokenRows, *, drafters: bool, centre: Floats | None = None, spread: Floats | None = None) -> Design:
    """Give intercept, standardised features, domains, and `drafters` where asked, each against the first present.

    `centre` and `spread` standardise; by default the mean and standard deviation of `rows`. Features without spread
    are left out.
    """
    mean = rows.numeric.mean(axis=0) if centre is None else centre
    sd = rows.numeric.std(axis=0) if spread is None else spread
    names, steps, columns = ["intercept"], [""], [np.ones(len(rows))]
    for i, name in enumerate(NUMERIC):
        if sd[i] > 1e-9:
            names.append(name)
            steps.append(f"{sd[i]:.3g} more")
            columns.append((rows.numeric[:, i] - mean[i]) / sd[i])
    kinds = [("domain", rows.domain, rows.domains)]
    if drafters:
        kinds.append(("drafter", rows.drafter, rows.drafters))
    for kind, index, labels in kinds:
        present = np.unique(index)
        for code in present[1:]:
            names.append(f"{kind} {labels[code]}")
            steps.append(f"against {labels[present[0]]}")
            columns.append((index == code).astype(np.float64))
    return Design(tuple(names), np.stack(columns, axis=1), tuple(steps))


def regress(rows: TokenRows, rng: Generator) -> Regression:
    """Fit the regression three ways; see the module. Warns `ConvergenceWarning` for every fit with troubles."""
    troubles: list[str] = []
    centre, spread = rows.numeric.mean(axis=0), rows.numeric.std(axis=0)
    thin = rows.thinned(EXCHANGEABLE_ROWS, rng)
    prompts = len(np.unique(rows.prompt))

    def columns(some: TokenRows, drafters: bool) -> Design:
        return design(some, drafters=drafters, centre=centre, spread=spread)

    full = columns(rows, True)
    independence, _, converged = _equations(rows, full, "independence")
    if not converged:
        troubles.append("the independence equations did not converge and are left out")
        independence = {}
    exchangeable, correlation, converged = _equations(thin, columns(thin, True), "exchangeable")
    if not converged:
        troubles.append(f"the exchangeable equations did not converge on {len(thin):,} rows and are left out")
        exchangeable, correlation = {}, None
    mixed = _mixed(rows, columns, rng)
    troubles += mixed.troubles
    for trouble in troubles:
        warnings.warn(f"token regression: {trouble}", ConvergenceWarning, stacklevel=2)
    ratios = tuple(
        OddsRatio(name, step, exchangeable.get(name), independence.get(name), mixed.ratios.get(name))
        for name, step in zip(full.names, full.steps, strict=True)
        if name != "intercept"
    )
    used = {"exchangeable": len(thin), "independence": len(rows), "mixed": mixed.rows}
    return Regression(
        rows=used,
        prompts=prompts,
        ratios=ratios,
        correlation=correlation,
        prompt_sd=mixed.prompt_sd,
        drafter_sd=mixed.drafter_sd,
        mixed_by=mixed.by,
        troubles=tuple(troubles),
    )


def _equations(rows: TokenRows, columns: Design, kind: str) -> tuple[dict[str, Estimate], float | None, bool]:
    """Generalised estimating equations clustered by prompt: ratios, working correlation, whether they converged."""
    import statsmodels.api as sm

    order = np.argsort(rows.prompt, kind="stable")
    y, x, groups = rows.accepted[order].astype(float), columns.values[order], rows.prompt[order]
    family = sm.families.Binomial()
    clusters = len(np.unique(groups))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the flag and the numbers are read below
        if kind == "independence":
            # The same estimates as equations with working independence, in one pass of weighted least squares.
            codes = np.unique(groups, return_inverse=True)[1]
            fit = sm.GLM(y, x, family=family).fit(cov_type="cluster", cov_kwds={"groups": codes})
            correlation = None
        else:
            start = sm.GLM(y, x, family=family).fit().params
            structure = sm.cov_struct.Exchangeable()
            fit = sm.GEE(y, x, groups=groups, family=family, cov_struct=structure).fit(start_params=start)
            correlation = number(float(structure.dep_params))
    good = bool(fit.converged) and bool((np.abs(fit.params) < _RUNAWAY).all()) and bool((fit.bse < _RUNAWAY).all())
    reach = float(stdtrit(max(clusters - 1, 1), (1 + LEVEL) / 2))
    return _ratios(columns.names, fit.params, fit.bse, reach, clusters), correlation, good


def _ratios(names: Sequence[str], mean: Any, sd: Any, reach: float, requests: int) -> dict[str, Estimate]:
    b, half = np.asarray(mean), reach * np.asarray(sd)
    with np.errstate(all="ignore"):
        rows = np.exp([b, b - half, b + half]).T.tolist()
    return {
        name: Estimate(number(value), number(low), number(high), requests)
        for name, (value, low, high) in zip(names, rows, strict=True)
    }


@dataclass(frozen=True)
class _Mixed:
    rows: int
    ratios: dict[str, Estimate]
    prompt_sd: float | None
    drafter_sd: float | None
    by: str | None
    troubles: list[str]


def _mixed(rows: TokenRows, columns: Any, rng: Generator) -> _Mixed:
    """Random intercepts by prompt and drafter: Laplace, and where its mode collapses, variational."""
    some = rows.thinned(MIXED_ROWS, rng)
    fixed = columns(some, False)
    found = _laplace(some, fixed, rng)
    troubles = []
    by = "Laplace"
    if found is None:
        some = rows.thinned(VARIATIONAL_ROWS, rng)
        fixed = columns(some, False)
        found, by = _variational(some, fixed, rng), "variational"
        troubles.append(
            "the Laplace fit of the mixed model did not converge; its variational fit stands in, whose intervals are "
            "too narrow"
        )
    if found is None:
        troubles[-1] = "the mixed model did not converge and is left out"
        return _Mixed(len(some), {}, None, None, None, troubles)
    mean, sd, logs = found
    prompts = len(np.unique(some.prompt))
    ratios = _ratios(fixed.names, mean, sd, float(stdtrit(np.inf, (1 + LEVEL) / 2)), prompts)
    scale = [number(float(np.exp(v))) for v in logs]
    return _Mixed(len(some), ratios, scale[0], scale[1] if len(scale) > 1 else None, by, troubles)


def _model(rows: TokenRows, fixed: Design) -> Any:
    """The mixed model; a random effect by drafter only where there is more than one."""
    from scipy.sparse import csr_matrix, hstack
    from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM

    blocks, kinds = [], []
    for kind, index in enumerate((rows.prompt, rows.drafter)):
        labels, place = np.unique(index, return_inverse=True)
        if kind == 1 and len(labels) < 2:
            continue
        ones = np.ones(len(rows))
        blocks.append(csr_matrix((ones, (np.arange(len(rows)), place)), shape=(len(rows), len(labels))))
        kinds += [kind] * len(labels)
    effects = hstack(blocks, format="csr")
    return BinomialBayesMixedGLM(
        rows.accepted.astype(float), fixed.values, effects, np.array(kinds), vcp_p=1.0, fe_p=5.0
    )


def _laplace(rows: TokenRows, fixed: Design, rng: Generator) -> tuple[Floats, Floats, Floats] | None:
    """Posterior mode and its curvature: fixed effects, their standard deviations, log SDs of the random effects.

    What `fit_map` of statsmodels does, from a start that is given here so that equal seeds give equal results.
    None where the search fails or a random effect collapses.
    """
    from scipy.optimize import minimize
    from statsmodels.tools.numdiff import approx_fprime

    model = _model(rows, fixed)
    start = np.concatenate([np.zeros(model.k_fep), np.full(model.k_vcp, -0.5), rng.normal(0, 0.5, model.k_vc)])

    def loss(p: Floats) -> float:
        return -float(model.logposterior(p))

    def slope(p: Floats) -> Floats:
        return -np.asarray(model.logposterior_grad(p))

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        mode = minimize(loss, start, jac=slope, method="BFGS")
        logs = mode.x[model.k_fep : model.k_fep + model.k_vcp]
        if not np.isfinite(mode.fun) or np.any(logs < _COLLAPSED) or np.abs(mode.jac).max() > 1e-2 * len(rows) ** 0.5:
            return None
        curvature = approx_fprime(mode.x, slope)
        variance = np.diag(np.linalg.pinv((curvature + curvature.T) / 2))[: model.k_fep]
    if not (variance > 0).all():
        return None
    return mode.x[: model.k_fep], np.sqrt(variance), logs


def _variational(rows: TokenRows, fixed: Design, rng: Generator) -> tuple[Floats, Floats, Floats] | None:
    model = _model(rows, fixed)
    size = model.k_fep + model.k_vcp + model.k_vc
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        fit = model.fit_vb(mean=rng.normal(0, 0.1, size), sd=np.full(size, 0.3))
    if not bool(fit.optim_retvals["success"]):
        return None
    return np.asarray(fit.fe_mean), np.asarray(fit.fe_sd), np.asarray(fit.vcp_mean)
