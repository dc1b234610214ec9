"""Adaptive cascades: a quality predictor, optimal stopping on its posterior, and the frontier of cost and quality.

>>> from analysis.cascade import read_quality_table, study_cascade
>>> findings = study_cascade(read_quality_table("answers.csv"))
"""

from analysis.cascade.findings import CascadeFindings
from analysis.cascade.published import switch_points
from analysis.cascade.reading import bundled_tables, read_quality_table
from analysis.cascade.study import study_cascade
from analysis.cascade.table import QualityTable

__all__ = [
    "CascadeFindings",
    "QualityTable",
    "bundled_tables",
    "read_quality_table",
    "study_cascade",
    "switch_points",
]
