"""Drafted tokens one by one: what their acceptance depends on, how well it is foreseen, and its hazard by depth."""

from analysis.tokens.hazard import HazardCurve, HazardPoint, Trend, hazard_curves, kaplan_meier
from analysis.tokens.heldout import HeldOut, Score, hold_out
from analysis.tokens.odds import OddsRatio, Regression, regress
from analysis.tokens.rows import TokenRows, token_rows
from analysis.tokens.study import TokenFindings, study_tokens

__all__ = [
    "HazardCurve",
    "HazardPoint",
    "HeldOut",
    "OddsRatio",
    "Regression",
    "Score",
    "TokenFindings",
    "TokenRows",
    "Trend",
    "hazard_curves",
    "hold_out",
    "kaplan_meier",
    "regress",
    "study_tokens",
    "token_rows",
]
