"""The forms of laws: known parameters are found again, intervals cover them, and few data tell nothing apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest

from analysis.common.bootstrap import Estimate
from analysis.common.records import from_json, to_json
from analysis.laws import FORMS, compare_forms, fit_form
from analysis.laws.fit import FittedForm
from calibration.common.errors import ConvergenceWarning, ReportError

X = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
Curve = Callable[[np.ndarray], np.ndarray]
TRUE: dict[str, tuple[tuple[float, ...], Curve]] = {
    "constant": ((2.0,), lambda x: 2.0 + 0 * x),
    "log-linear": ((1.0, 0.5), lambda x: 1.0 + 0.5 * np.log(x)),
    "power": ((1.5, 0.3), lambda x: 1.5 * x**0.3),
    "saturating": ((4.0, 3.0, 0.5), lambda x: 4.0 - 3.0 * x**-0.5),
    "logit": ((-1.0, 0.6, 5.0), lambda x: 5.0 / (1 + np.exp(1.0 - 0.6 * np.log(x)))),
}


def between(estimate: Estimate, truth: float) -> bool:
    """Tell whether the interval holds the truth; an interval is required."""
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize("form", FORMS)
def test_exact_points_give_the_parameters(form: str) -> None:
    parameters, curve = TRUE[form]
    fitted = fit_form(form, X, curve(X), reference=1.0)
    assert fitted.values == pytest.approx(parameters, rel=1e-4)
    assert fitted.converged
    assert fitted.predict([100.0, 3.0]) == pytest.approx(curve(np.array([100.0, 3.0])), rel=1e-4)
    assert fitted.extrapolates([100.0, 3.0]).tolist() == [True, False]


def test_the_reference_moves_parameters_and_not_predictions() -> None:
    _, curve = TRUE["power"]
    here, there = (fit_form("power", X, curve(X), reference=r) for r in (1.0, 8.0))
    assert there.parameters["a"].value == pytest.approx(1.5 * 8**0.3, rel=1e-5)
    assert here.predict(5.0) == pytest.approx(there.predict(5.0))


def test_a_probability_keeps_its_scale() -> None:
    y = 1 / (1 + np.exp(0.5 - 0.7 * np.log(X)))
    fitted = fit_form("logit", X, y, scale=1.0, reference=1.0)
    assert fitted.values == pytest.approx((-0.5, 0.7))
    assert list(fitted.parameters) == ["a", "b"]
    assert float(fitted.predict(1e12)) < 1


@pytest.mark.parametrize("form", ["log-linear", "power", "saturating"])
def test_covariance_intervals_cover_about_19_in_20(form: str) -> None:
    parameters, curve = TRUE[form]
    rng = np.random.default_rng(5)
    x = np.repeat(X, 3)
    inside = []
    for _ in range(200):
        fitted = fit_form(form, x, curve(x) + rng.normal(0, 0.05, len(x)), reference=1.0)
        for estimate, truth in zip(fitted.parameters.values(), parameters, strict=True):
            inside.append(between(estimate, truth))
    assert 0.92 <= np.mean(inside) <= 0.98


def test_the_interval_of_the_curve_covers_it() -> None:
    _, curve = TRUE["power"]
    rng = np.random.default_rng(6)
    inside = []
    for _ in range(200):
        low, high = fit_form("power", X, curve(X) + rng.normal(0, 0.1, len(X))).interval([3.0, 128.0])
        inside.append((low <= curve(np.array([3.0, 128.0]))) & (curve(np.array([3.0, 128.0])) <= high))
    assert 0.9 <= np.mean(inside) <= 0.99


def test_intervals_over_groups_see_that_groups_differ() -> None:
    rng = np.random.default_rng(7)
    x, groups = np.tile(X, 12), np.repeat([f"g{i}" for i in range(12)], len(X))
    y = 1 + 0.5 * np.log(x) + np.repeat(rng.normal(0, 0.4, 12), len(X)) + rng.normal(0, 0.01, len(x))
    alone = fit_form("log-linear", x, y).parameters["a"]
    grouped = fit_form("log-linear", x, y, groups=list(groups), seed=1).parameters["a"]
    assert grouped.requests == 12
    assert grouped.high - grouped.low > 1.8 * (alone.high - alone.low)  # type: ignore[operator]


def test_weights_decide_what_counts() -> None:
    y = 1 + 0.5 * np.log(X)
    y[-1] += 5
    fitted = fit_form("log-linear", X, y, weights=[1, 1, 1, 1, 1, 1, 1e-9], reference=1.0)
    assert fitted.values == pytest.approx((1.0, 0.5), abs=1e-6)


def test_a_straight_line_is_no_saturation() -> None:
    with pytest.warns(ConvergenceWarning, match="saturating"):
        fitted = fit_form("saturating", X, 1 + 0.5 * np.log(X))
    assert not fitted.converged
    assert fitted.trouble


def test_a_fit_survives_json() -> None:
    fitted = fit_form("power", X, TRUE["power"][1](X))
    assert from_json(FittedForm, to_json(fitted), "fit") == fitted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("powr", X, X), "did you mean 'power'"),
        (("power", [0, 1, 2], [1, 2, 3]), "every x must be finite and > 0"),
        (("power", [1, 2], [1, 2]), "a point more than parameters"),
        (("power", [1, 2, 3], [1, 2]), "one length"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, object, object], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        fit_form(*arguments)  # type: ignore[arg-type]


def noisy(form: str, groups: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    x = np.tile(X, groups)
    y = TRUE[form][1](x) * np.repeat(rng.uniform(0.8, 1.2, groups), len(X))
    return x, y + rng.normal(0, noise, len(x)), [f"g{i}" for i in range(groups) for _ in X]


@pytest.mark.parametrize("form", ["log-linear", "saturating", "power"])
def test_plenty_of_data_tell_the_true_form(form: str) -> None:
    x, y, groups = noisy(form, 8, 0.01, 3)
    found = compare_forms(x, y, ["constant", "log-linear", "power", "saturating"], groups=groups, seed=2)
    others = {"constant", "log-linear", "power", "saturating"} - {form}
    assert found.extrapolation.best == form or form in found.extrapolation.alike
    assert not others - {"saturating"} & set(found.extrapolation.alike)
    assert "constant" not in found.interpolation.alike


def test_few_noisy_data_tell_nothing() -> None:
    x, y, groups = noisy("log-linear", 3, 0.4, 4)
    found = compare_forms(x, y, ["log-linear", "power", "saturating"], groups=groups, seed=2)
    assert len(found.interpolation.alike) == 2
    assert "not distinguishable from any other form" in found.interpolation.statement


def test_too_few_levels_choose_nothing() -> None:
    found = compare_forms(X[:4], X[:4], ["power", "constant"], seed=0)
    assert found.interpolation.best is None
    assert "4 levels of x are too few" in found.extrapolation.statement


def test_tasks_leave_out_what_they_say() -> None:
    found = compare_forms(X, TRUE["power"][1](X), ["power", "log-linear"], seed=0)
    assert (found.interpolation.points, found.extrapolation.points) == (5, 3)
    assert found.interpolation.error("power").rmse == pytest.approx(0, abs=1e-5)
    assert found.interpolation.alike == ("log-linear",)  # five squared errors are too few for bounds to tell them
    many = np.geomspace(X[0], X[-1], 14)
    assert compare_forms(many, TRUE["power"][1](many), ["power", "log-linear"], seed=0).interpolation.alike == ()
    # The line in ln x through the first four levels misses the fifth by this much, and the later ones by more.
    line = np.polyfit(np.log(X[:4]), TRUE["power"][1](X[:4]), 1)
    fifth = np.polyval(line, np.log(X[4])) - TRUE["power"][1](X[4])
    assert found.extrapolation.error("log-linear").rmse > abs(fifth)


def test_nothing_warns_while_comparing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare_forms(X, 1 + 0.5 * np.log(X), ["saturating", "log-linear"], seed=0)
    assert found.interpolation.error("saturating").failures > 0
