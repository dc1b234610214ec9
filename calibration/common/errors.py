"""Everything that paceline raises on purpose.

    PacelineError                 a mistake or a limit that the message explains; the command line prints it alone
    ├── TraceError                a TraceSet breaks its contract (file, column, row, rule)
    ├── ScenarioError             a scenario file has faults (all of them, each with its place)
    │   └── ExportError           an engine has no words for a setting
    ├── CostError                 a cost model cannot be built from what was given
    ├── ReplayError               a trace cannot answer what a policy asks of it
    ├── CalibrationError          a model, a prompt file or a recording job cannot be used
    ├── ReportError               a figure or a document could not be made
    └── MissingExtraError         an optional dependency is not installed; says which pip command brings it

    PacelineWarning               something the reader of a result must know
    ├── ExtrapolationWarning      a number lies outside what was measured
    ├── ConvergenceWarning        a fit did not converge or is degenerate
    └── ReplicationWarning        replications do not differ, so that they say nothing about chance

A message reads *where: rule, got value; did you mean ...?*
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PacelineError(Exception):
    """A mistake or a limit that the message explains in full."""


class TraceError(PacelineError):
    """A TraceSet breaks its contract: names the file, the column, the row and the rule."""


class ScenarioError(PacelineError):
    """A scenario has faults: names every one with its place."""


class ExportError(ScenarioError):
    """An engine has no words for a setting; says what it has words for."""


class CostError(PacelineError):
    """A cost model cannot be built, or cannot price what is asked."""


class ReplayError(PacelineError):
    """A trace cannot answer what a policy asks of it."""


class CalibrationError(PacelineError):
    """A model, a prompt file or a recording job cannot be used."""


class ReportError(PacelineError):
    """A figure or a document could not be made."""


class MissingExtraError(PacelineError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module}: not installed; pip install 'paceline[{extra}]' brings it")
        self.module = module
        self.extra = extra


class PacelineWarning(UserWarning):
    """Something the reader of a result must know."""


class ExtrapolationWarning(PacelineWarning):
    """A number lies outside what was measured."""


class ConvergenceWarning(PacelineWarning):
    """A fit did not converge or is degenerate."""


class ReplicationWarning(PacelineWarning):
    """Replications do not differ, so that they say nothing about chance."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Give ``"; did you mean 'x'?"`` for the closest choice, else ``"; choose from ..."``, to end an error with."""
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choose from {', '.join(known)}" if known else ""
