"""One law as the data have it: points with intervals, fits of every form, and which form predicts best."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.common.bootstrap import Estimate
from analysis.common.records import Record
from analysis.laws.comparison import LEAST_LEVELS, FormComparison, Ranking, compare_forms
from analysis.laws.fit import FittedForm, Redraw, fit_form
from analysis.laws.forms import FORMS
from calibration.common.errors import ConvergenceWarning, ReportError

PUBLISHED_FORM = "log-linear"
"""The form that Scylla (arXiv 2505.07858) reports for size, training tokens and batch; tested here as a form."""

Kind = Literal["measured", "simulated"]


@dataclass(frozen=True)
class LawPoint:
    """One point of a curve: y at x, with its interval over requests where there is one."""

    x: float
    y: Estimate


@dataclass(frozen=True)
class Curve:
    """The points of one group (a domain, a drafter, a student) and the forms fitted to them.

    A form that could not be fitted (more parameters than the points bear) is absent from ``fits``, and ``fits`` is
    empty for a curve that only serves the comparison of forms.
    """

    name: str
    points: tuple[LawPoint, ...]
    fits: tuple[FittedForm, ...]

    def fit(self, form: str) -> FittedForm | None:
        """Give the fit of `form`, None where it could not be fitted."""
        return next((each for each in self.fits if each.form == form), None)


@dataclass(frozen=True)
class Law:
    """What one quantity does as another grows.

    ``x_name`` and ``y_name`` say the quantities with their units, and whether a length includes the bonus token.
    ``curves`` begins with the one to draw; the forms are compared on the ``compared`` ones ("domains", say), each
    with parameters of its own. ``caution`` says what the law leaves out.
    """

    key: str
    title: str
    x_name: str
    y_name: str
    kind: Kind
    source: str
    requests: int | None
    curves: tuple[Curve, ...]
    compared: str
    comparison: FormComparison
    caution: str

    @property
    def drawn(self) -> Curve:
        """The curve that stands for the law."""
        return self.curves[0]

    def published(self, task: Literal["interpolation", "extrapolation"]) -> str:
        """Tell how the log-linear form of Scylla fares: `best`, `not told apart`, `worse` or `too few levels`."""
        ranking: Ranking = getattr(self.comparison, task)
        if ranking.best is None:
            return "too few levels"
        if ranking.best == PUBLISHED_FORM:
            return "best"
        return "not told apart" if PUBLISHED_FORM in ranking.alike else "worse"


@dataclass(frozen=True)
class LawFindings(Record):
    """The laws that the data at hand could be asked for, and in ``absent`` why others could not.

    ``draft_tokens`` is the draft length of every accepted length here.
    """

    draft_tokens: int
    seed: int
    laws: tuple[Law, ...]
    absent: tuple[str, ...]
    schema_version: int = 1

    @property
    def rests_on(self) -> str:
        """What the findings stand on, in a line."""
        return f"{len(self.laws)} laws, each fitted to the figures that it names"

    def law(self, key: str) -> Law:
        """Give the law `key`. Raises `ReportError` where it is not among the findings."""
        for law in self.laws:
            if law.key == key:
                return law
        raise ReportError(f"laws: no law '{key}' was found; present are {', '.join(law.key for law in self.laws)}")


def fit_all(
    name: str,
    points: Sequence[LawPoint],
    *,
    scale: float | None = None,
    weighted: bool = False,
    redraw: Redraw | None = None,
    forms: Iterable[str] = tuple(FORMS),
) -> Curve:
    """Fit every form to `points`; `weighted` by the inverse square of the half-width of their intervals.

    Fits that did not converge are kept and carry their trouble, so that none is warned of here.
    """
    known = [p for p in points if p.y.value is not None]
    x, y = [p.x for p in known], [p.y.value or 0.0 for p in known]
    weights = _weights(known) if weighted else None
    fits = []
    for form in forms:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                fits.append(fit_form(form, x, y, weights=weights, scale=scale, redraw=redraw))
            except ReportError:
                continue  # too few points for this form: absent, as `Curve` says
    return Curve(name, tuple(known), tuple(fits))


def _weights(points: Sequence[LawPoint]) -> list[float] | None:
    """Inverse variances from the intervals; None unless every point has one of some width."""
    widths = [(p.y.high - p.y.low) if p.y.high is not None and p.y.low is not None else 0.0 for p in points]
    return [1 / width**2 for width in widths] if all(width > 0 for width in widths) else None


def compare_curves(
    curves: Sequence[Curve], *, scale: float | None = None, seed: int = 0, forms: Sequence[str] = tuple(FORMS)
) -> FormComparison:
    """Compare the forms over `curves`, each a group of its own; a single curve is compared over its levels.

    Curves of too few levels to tell forms apart are left out, unless all are.
    """
    chosen = [curve for curve in curves if len({p.x for p in curve.points}) >= LEAST_LEVELS] or list(curves)
    x = [p.x for curve in chosen for p in curve.points]
    y = [p.y.value or 0.0 for curve in chosen for p in curve.points]
    groups = [curve.name for curve in chosen for _ in curve.points] if len(chosen) > 1 else None
    return compare_forms(x, y, forms, groups=groups, scale=scale, seed=seed)
