"""The size question: speed-up against the drafter's share of parameters, measured, extrapolated, and as published.

>>> from analysis.size import SizeSettings, study_size
>>> from calibration.traces import bundled
>>> study_size(bundled("smollm2-135m-cpu-distilled")).measured.curves[0].spot.best
"""

from analysis.size.findings import SizeFindings
from analysis.size.settings import Place, SizeSettings
from analysis.size.study import main_curve, study_size

__all__ = ["Place", "SizeFindings", "SizeSettings", "main_curve", "study_size"]
