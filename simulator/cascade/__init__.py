"""Cascades under traffic: stages that answer one after the other, until one of them is sure enough.

CascadeScenario -> paths of the items -> CascadeRouter -> a Fleet per stage -> CascadeResult
"""

from simulator.cascade.items import ItemTable, read_items
from simulator.cascade.run import simulate_cascade
from simulator.cascade.scenario import CascadeScenario, load_cascade, parse_cascade
from simulator.cascade.summing import CascadeResult

__all__ = [
    "CascadeResult",
    "CascadeScenario",
    "ItemTable",
    "load_cascade",
    "parse_cascade",
    "read_items",
    "simulate_cascade",
]
