"""How much an engine iteration costs, against the bare event loop under it. Run with --benchmark-enable."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import simpy
from builders import iid_traces
from scenarios import scenario

from simulator import simulate


def bare_loop(iterations: int) -> float:
    """One process that only lets time pass; gives the time it reached."""

    def tick(env: simpy.Environment) -> Generator[simpy.Event, None, None]:
        for _ in range(iterations):
            yield env.timeout(1.0)

    env = simpy.Environment()
    env.process(tick(env))
    env.run()
    return float(env.now)


def test_bare_simpy_loop(benchmark: Any) -> None:
    assert benchmark(bare_loop, 5000) == 5000


@pytest.mark.parametrize("policy", [None, 4, "oracle"])
@pytest.mark.parametrize("batch", [1, 16, 256])
def test_engine_iterations(benchmark: Any, batch: int, policy: int | str | None) -> None:
    traces = iid_traces(0.7, np.random.default_rng(0), sequences=32, output_tokens=200)
    plan = scenario(policy, batch=batch, workload={"requests": max(32, 2 * batch)})
    result = benchmark(simulate, plan, traces)
    iterations = result.summary["iterations"]
    assert result.summary["total_output_tokens"] == 200 * max(32, 2 * batch)
    start = time.perf_counter()
    bare_loop(iterations)
    bare = time.perf_counter() - start
    benchmark.extra_info["iterations"] = iterations
    if benchmark.stats is not None:
        benchmark.extra_info["bare SimPy loops"] = benchmark.stats.stats.min / bare
