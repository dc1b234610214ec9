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

The extra ``calibration``: torch and transformers, imported when needed and kept quiet.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any


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


def require(module: str) -> Any:
    """Import `module` of the extra ``calibration``; `MissingExtraError` says which pip command brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as fault:
        if fault.name and fault.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(module, "calibration") from None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the terminal for a while."""
    logging = require("transformers").utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
