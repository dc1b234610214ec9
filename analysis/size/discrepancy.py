"""How far engines lie from what prices predict, as published checks tell, and what that leaves of a prediction.

A check is a speed-up that others measured beside the one predicted. The logarithms of measured over predicted are
taken to be normal about 0 with an unknown standard deviation: n checks estimate it with n degrees of freedom, so that
a prediction errs by Student's law, wide where checks are few. A pair not checked draws its own error; two drafters of
one verifier and engine share most of theirs where their sizes are close. What they share, no check here tells: the
distance in size at which errors part is stated, and other values of it are shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from scipy.special import stdtrit

from analysis.common.bootstrap import LEVEL, number
from analysis.size.findings import Discrepancy, SpeedCheck
from calibration.common.arrays import Floats

_MOST = 50.0
"""Errors are cut at a factor of exp(50): that far out only the side counts."""


def discrepancy(checks: Sequence[SpeedCheck]) -> Discrepancy:
    """Estimate the error of a prediction from `checks`; without any, it is not known and left out."""
    if not checks:
        return Discrepancy(0, None, None, None)
    errors = np.array([check.log_error for check in checks])
    scale = float(np.sqrt((errors**2).mean()))
    reach = float(stdtrit(len(errors), (1 + LEVEL) / 2)) * scale
    largest = checks[int(np.abs(errors).argmax())]
    return Discrepancy(len(errors), number(scale), number(float(np.exp(min(reach, _MOST)))), largest)


def error_factors(found: Discrepancy, parameters: Floats, doublings: float, draws: int, rng: Generator) -> Floats:
    """Draw factors on the predicted speed-ups of drafters of so many `parameters`, shape (draws, n).

    Each factor's logarithm follows Student's law with as many degrees of freedom as there are checks, times their
    root mean square. Within a draw the errors of two sizes d doublings apart correlate with
    exp(-(d / doublings)^2 / 2); infinite `doublings`: one error for all sizes.
    """
    if found.log_error is None:
        return np.ones((draws, len(parameters)))
    apart = np.subtract.outer(np.log2(parameters), np.log2(parameters)) / doublings
    alike = np.exp(-(apart**2) / 2) + 1e-6 * np.eye(len(parameters))
    normal = rng.normal(size=(draws, len(parameters))) @ np.linalg.cholesky(alike).T
    scale = found.log_error * np.sqrt(found.checks / rng.chisquare(found.checks, size=draws))
    return np.asarray(np.exp(np.clip(scale[:, None] * normal, -_MOST, _MOST)))
