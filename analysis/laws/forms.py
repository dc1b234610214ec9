"""The forms a law may take, y as a function of x > 0, and their least-squares fits.

Every form is written in z = x / x_0 with a stated reference x_0, so that a parameter is a value at x_0 and not at
x = 1 parameter or 1 token. Sources: the log-linear laws of Scylla (Yan et al. 2025, arXiv 2505.07858: acceptance
length against ln of training tokens and of drafter capacity, speed against ln of batch size); power and saturating
forms as in the language-model scaling laws of Kaplan et al. 2020 and Hoffmann et al. 2022; the affine laws of SDSL
(arXiv 2603.11053) become these through perplexity, itself a power of size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from calibration.common.arrays import Floats
from calibration.common.errors import ReportError, did_you_mean

Params = Sequence[float] | Floats
"""Values of the parameters, in the order of `Form.parameters`."""


@dataclass(frozen=True)
class Form:
    """One shape of a law: its formula in z = x / x_0 and where a fit of it starts.

    ``slopes`` gives dy / d parameter at each z, shape (points, parameters). ``positive`` bounds the parameters that
    must be > 0: beyond, the form is another (e -> 0 is the log-linear law, a huge scale the power law). ``starts``
    gives candidate parameters for data (z, y).
    """

    name: str
    formula: str
    source: str
    parameters: tuple[str, ...]
    value: Callable[[Floats, Params], Floats]
    slopes: Callable[[Floats, Params], Floats]
    starts: Callable[[Floats, Floats], list[tuple[float, ...]]]
    positive: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def constant_value(z: Floats, p: Params) -> Floats:
    """y = a: no law at all, the null."""
    return np.full_like(z, p[0])


def log_linear_value(z: Floats, p: Params) -> Floats:
    """y = a + b ln z (Scylla, arXiv 2505.07858)."""
    return np.asarray(p[0] + p[1] * np.log(z))


def power_value(z: Floats, p: Params) -> Floats:
    """y = a z^b, fitted to y itself and not to ln y (Kaplan et al. 2020)."""
    return np.asarray(p[0] * np.power(z, p[1]))


def saturating_value(z: Floats, p: Params) -> Floats:
    """y = y_inf - b z^-e, e > 0 (Hoffmann et al. 2022, of losses): a limit, and a gap that a power closes."""
    return np.asarray(p[0] - p[1] * np.power(z, -p[2]))


def logit_value(z: Floats, p: Params) -> Floats:
    """y = scale / (1 + exp(-a - b ln z)): the logit of a share of a known or fitted whole is log-linear."""
    return np.asarray(p[2] * expit(p[0] + p[1] * np.log(z)))


def _constant_slopes(z: Floats, p: Params) -> Floats:
    return np.ones((len(z), 1))


def _log_linear_slopes(z: Floats, p: Params) -> Floats:
    return np.stack([np.ones_like(z), np.log(z)], axis=1)


def _power_slopes(z: Floats, p: Params) -> Floats:
    grown = np.power(z, p[1])
    return np.stack([grown, p[0] * grown * np.log(z)], axis=1)


def _saturating_slopes(z: Floats, p: Params) -> Floats:
    left = np.power(z, -p[2])
    return np.stack([np.ones_like(z), -left, p[1] * left * np.log(z)], axis=1)


def _logit_slopes(z: Floats, p: Params) -> Floats:
    share = expit(p[0] + p[1] * np.log(z))
    steep = p[2] * share * (1 - share)
    return np.stack([steep, steep * np.log(z), share], axis=1)


_EXPONENTS = np.geomspace(0.02, 5.0, 15)
_SCALES = (1.02, 1.1, 1.3, 2.0, 4.0)


def _constant_starts(z: Floats, y: Floats) -> list[tuple[float, ...]]:
    return [(float(y.mean()),)]


def _linear(u: Floats, y: Floats) -> tuple[float, float]:
    """Intercept and slope of y on u."""
    slope, intercept = np.polyfit(u, y, 1)
    return float(intercept), float(slope)


def _log_linear_starts(z: Floats, y: Floats) -> list[tuple[float, ...]]:
    return [_linear(np.log(z), y)]


def _power_starts(z: Floats, y: Floats) -> list[tuple[float, ...]]:
    exponents = np.concatenate([-_EXPONENTS, [0.0], _EXPONENTS])
    basis = z[:, None] ** exponents
    heights = (basis * y[:, None]).sum(axis=0) / (basis**2).sum(axis=0)
    return [(float(a), float(b)) for a, b in zip(heights, exponents, strict=True)]


def _saturating_starts(z: Floats, y: Floats) -> list[tuple[float, ...]]:
    lines = [(_linear(z**-e, y), float(e)) for e in _EXPONENTS]
    return [(limit, -slope, e) for (limit, slope), e in lines]


def _logit_starts(z: Floats, y: Floats) -> list[tuple[float, ...]]:
    top = max(float(y.max()), 1e-9)
    return [(*_logit_line(z, y, factor * top), factor * top) for factor in _SCALES]


def _logit_line(z: Floats, y: Floats, scale: float) -> tuple[float, float]:
    share = np.clip(y / scale, 1e-3, 1 - 1e-3)
    return _linear(np.log(z), np.log(share / (1 - share)))


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            name="constant",
            formula="y = a",
            source="the null",
            parameters=("a",),
            value=constant_value,
            slopes=_constant_slopes,
            starts=_constant_starts,
        ),
        Form(
            name="log-linear",
            formula="y = a + b ln(x/x_0)",
            source="Scylla, arXiv 2505.07858",
            parameters=("a", "b"),
            value=log_linear_value,
            slopes=_log_linear_slopes,
            starts=_log_linear_starts,
        ),
        Form(
            name="power",
            formula="y = a (x/x_0)^b",
            source="Kaplan et al. 2020",
            parameters=("a", "b"),
            value=power_value,
            slopes=_power_slopes,
            starts=_power_starts,
        ),
        Form(
            name="saturating",
            formula="y = y_inf - b (x/x_0)^-e",
            source="Hoffmann et al. 2022",
            parameters=("y_inf", "b", "e"),
            value=saturating_value,
            slopes=_saturating_slopes,
            starts=_saturating_starts,
            positive={"e": (0.01, 30.0)},
        ),
        Form(
            name="logit",
            formula="y = scale * sigmoid(a + b ln(x/x_0))",
            source="logistic regression on ln x",
            parameters=("a", "b", "scale"),
            value=logit_value,
            slopes=_logit_slopes,
            starts=_logit_starts,
            positive={"scale": (1e-9, 1e9)},
        ),
    )
}
"""The forms by name; `constant` is the null."""


def find_form(name: str, scale: float | None = None) -> Form:
    """Give the form `name`, the logit with its scale fixed at `scale` where that is given (1 for probabilities).

    Raises `ReportError` for an unknown name or a scale that is not positive.
    """
    if name not in FORMS:
        raise ReportError(f"form: must be a known form, got '{name}'{did_you_mean(name, FORMS)}")
    if name != "logit" or scale is None:
        return FORMS[name]
    if not scale > 0:
        raise ReportError(f"form 'logit': scale must be > 0, got {scale}")
    return _logit_of(scale)


def _logit_of(scale: float) -> Form:
    """The logit form with a given scale: two parameters."""
    free = FORMS["logit"]
    return Form(
        name="logit",
        formula=f"y = {scale:g} * sigmoid(a + b ln(x/x_0))",
        source=free.source,
        parameters=("a", "b"),
        value=lambda z, p: logit_value(z, (*p, scale)),
        slopes=lambda z, p: _logit_slopes(z, (*p, scale))[:, :2],
        starts=lambda z, y: [_logit_line(z, y, scale)],
    )


def checked(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """Give x and y as arrays of one length. Raises `ReportError` unless all are finite and every x > 0."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if xs.ndim != 1 or xs.shape != ys.shape:
        raise ReportError(f"fit: x and y must be lists of one length, got shapes {xs.shape} and {ys.shape}")
    if not (np.isfinite(xs).all() and np.isfinite(ys).all() and (xs > 0).all()):
        raise ReportError("fit: every x must be finite and > 0 and every y finite, got others")
    return xs, ys


def reference_of(x: Floats) -> float:
    """The geometric mean of the distinct x, to two digits: a round number amid the data."""
    return float(f"{np.exp(np.log(np.unique(x)).mean()):.2g}")
