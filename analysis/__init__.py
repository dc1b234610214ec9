"""Analysis: acceptance with honest intervals, simulated speed-up, and the findings of both. No torch needed.

>>> from analysis import study
>>> from calibration.traces import bundled
>>> findings = study(bundled("smollm2-135m-cpu-greedy"))
>>> findings.answer.headline.drafter
"""

from analysis.speedup.findings import Findings, StudySettings
from analysis.speedup.study import study

__all__ = ["Findings", "StudySettings", "study"]
