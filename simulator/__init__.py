"""Simulator: replay recorded behaviour in a serving engine under traffic and policies. No torch needed.

>>> from simulator import load_scenario, simulate
>>> result = simulate(load_scenario("scenario.toml"))
>>> result.summary["output_throughput"]
"""

from simulator.loading import load_scenario, parse_scenario
from simulator.result import RunResult
from simulator.run import simulate
from simulator.scenario import Scenario

__all__ = ["RunResult", "Scenario", "load_scenario", "parse_scenario", "simulate"]
