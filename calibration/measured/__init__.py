"""Measured runs: what a real engine did under a scenario, as a folder that lies beside its prediction.

    MeasuredRun     manifest, requests and steps of one condition, every repeat of it
    Manifest        what was measured, on which engine and device, on which clock

No torch needed; see `calibration.measured.run` for the tables.
"""

from __future__ import annotations

from calibration.measured.run import EngineInfo, Manifest, MeasuredRun

__all__ = ["EngineInfo", "Manifest", "MeasuredRun"]
