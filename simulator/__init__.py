"""Simulator: replay recorded behaviour in a serving engine under traffic and policies. No torch needed.

>>> from simulator import load_scenario, simulate
>>> result = simulate(load_scenario("scenario.toml"))
>>> result.summary["output_throughput"]
"""

from simulator.experiments.axes import load_sweep
from simulator.experiments.compare import compare
from simulator.experiments.replicate import replicate
from simulator.experiments.sweep import run_sweep
from simulator.results.result import RunResult
from simulator.running.run import simulate
from simulator.scenario.loading import load_scenario, parse_scenario
from simulator.scenario.scenario import Scenario

__all__ = [
    "RunResult",
    "Scenario",
    "compare",
    "load_scenario",
    "load_sweep",
    "parse_scenario",
    "replicate",
    "run_sweep",
    "simulate",
]
