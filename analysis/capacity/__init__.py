"""Capacity: how much load a replica carries within its objectives, and how many devices a given load needs."""

from analysis.capacity.findings import CapacityFindings, Needed, Objective, PolicyCapacity, RatePoint
from analysis.capacity.plan import plan_capacity
from analysis.capacity.sustain import study_scenarios

__all__ = [
    "CapacityFindings",
    "Needed",
    "Objective",
    "PolicyCapacity",
    "RatePoint",
    "plan_capacity",
    "study_scenarios",
]
