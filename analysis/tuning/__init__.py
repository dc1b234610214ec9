"""Tuning: the best drafter, policy and settings for a scenario, with an interval and what comes as close."""

from analysis.tuning.findings import TuneFindings, parse_slo
from analysis.tuning.search import TuneSettings, tune

__all__ = ["TuneFindings", "TuneSettings", "parse_slo", "tune"]
