"""Calibration: record what real drafter/verifier pairs do, and read such records back.

Importing this package needs no torch; the modules that record (`models`, `record`, `timing`, `live` ...) do.
"""

from calibration.common.errors import PacelineError, PacelineWarning
from calibration.traces import TraceSet, bundled, bundled_names

__all__ = ["PacelineError", "PacelineWarning", "TraceSet", "bundled", "bundled_names"]
