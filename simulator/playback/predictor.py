"""Predicted acceptance of a drafted token, from how sure the drafter is of it."""

from __future__ import annotations

import warnings

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ConvergenceWarning, ReplayError
from simulator.playback.recorded import Material

FOLDS = 5
"""Sequences are dealt into so many groups; each is predicted by a fit to the other ones."""
_EDGE = 1e-6
"""Confidences are kept so far from 0 and 1, where the logit would be infinite."""
_RIDGE = 1e-4
"""Penalty on squared coefficients other than the constant, where the labels separate perfectly."""
_STEPS = 50


def features(confidence: Floats, entropy: Floats) -> Floats:
    """Give (1, logit of the confidence, entropy in nats) along a new last axis."""
    sure = np.clip(confidence, _EDGE, 1 - _EDGE)
    return np.stack([np.ones_like(sure), np.log(sure / (1 - sure)), entropy], axis=-1)


def logistic(x: Floats) -> Floats:
    """Give 1 / (1 + exp(-x))."""
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))), dtype=np.float64)


def fit_logistic(x: Floats, labels: Floats) -> Floats:
    """Fit coefficients b of P = logistic(x b) to labels in [0, 1] by iteratively reweighted least squares.

    Soft labels are probabilities, as SpecDec++ trains its head on min(1, p / q). The first column of `x` is the
    constant; the others carry a tiny ridge penalty. The mean prediction equals the mean label.
    """
    b = np.zeros(x.shape[1])
    ridge = np.diag([0.0] + [_RIDGE] * (x.shape[1] - 1))
    for _ in range(_STEPS):
        p = logistic(x @ b)
        gradient = x.T @ (labels - p) - ridge @ b
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge + 1e-9 * np.eye(len(b)), gradient)
        b += np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-8:
            return b
    warnings.warn(
        f"the logistic fit of acceptance did not converge in {_STEPS} steps", ConvergenceWarning, stacklevel=2
    )
    return b


def fit_by_fold(material: Material, confidence: Floats, entropy: Floats) -> Floats:
    """Give coefficients for every sequence (sequences, 3), fitted to the positions of sequences of other folds.

    So that no request is predicted from its own text. Labels are the recorded acceptance probabilities (greedy:
    matched or not) at positions on the text; a drafter beyond its first wrong token was not seen in training.
    """
    (accepted,) = material.columns("accept_probability")
    owners = material.owners
    known = np.isfinite(accepted) & np.isfinite(confidence) & np.isfinite(entropy)
    x, labels, fold = features(confidence[known], entropy[known]), accepted[known], owners[known] % FOLDS
    coefficients = np.zeros((FOLDS, 3))
    for k in range(min(FOLDS, len(material.sequences))):
        others = fold != k
        if not others.any():
            raise ReplayError(
                "stopping.coefficients: must be given where a single sequence is served: acceptance is fitted to the "
                "positions of other sequences"
            )
        coefficients[k] = fit_logistic(x[others], labels[others])
    return coefficients[np.arange(len(material.sequences)) % FOLDS]


def predicted(coefficients: Floats, owner: Ints, confidence: Floats, entropy: Floats) -> Floats:
    """Give the probability of acceptance; arrays (slots, steps), `coefficients` by sequence, `owner` by slot."""
    return logistic(np.einsum("ijk,ik->ij", features(confidence, entropy), coefficients[owner]))
