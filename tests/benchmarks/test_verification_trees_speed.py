"""What verification over chains and trees costs a node, at a vocabulary of 150,000. Run with --benchmark-enable.

The unit is one pass over a pair of rows, norm([p - q]+). `pytest -s` shows the ratios to it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from enumeration import random_pair

from calibration.verification import KSequential, Recursive, residual
from calibration.verification.builders import eagle_tree, opt_tree, tree_table
from calibration.verification.chains import BlockVerification, TokenLevelChain
from calibration.verification.delayed import DelayedAction, DelayedExpansion, draw_delayed_tree
from calibration.verification.recursive import TopDown
from calibration.verification.traversal import Traversal
from calibration.verification.trees import TreeShape, draw_tree

V = 150_000
MOST_SECONDS_A_NODE = 0.05
SHAPE = TreeShape.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0)])


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, float]:
    """Verifier, drafter, and the seconds of one residual."""
    pairs = [random_pair(np.random.default_rng(seed), V, 0.7) for seed in range(5)]
    passes = []
    for _ in range(9):
        start = time.perf_counter()
        residual(*pairs[0])
        passes.append(time.perf_counter() - start)
    return lambda prefix: pairs[len(prefix)][0], lambda prefix: pairs[len(prefix)][1], min(passes)


def report(benchmark: Any, name: str, nodes: int, unit: float) -> None:
    """Print and bound the seconds a node; nothing is measured where benchmarks are switched off."""
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.min / nodes
        benchmark.extra_info["passes a node"] = seconds / unit
        print(f"\n{name}: {1e3 * seconds:.2f} ms a node, {seconds / unit:.1f} passes of {1e3 * unit:.2f} ms")
        assert seconds < MOST_SECONDS_A_NODE


@pytest.mark.parametrize("rule", [TokenLevelChain(), BlockVerification()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("call", ["law", "verify"])
def test_chains(benchmark: Any, models: tuple[Any, Any, float], rule: Any, call: str) -> None:
    target, drafter, unit = models
    rng = np.random.default_rng(0)
    drafts = [int(rng.choice(V, p=drafter((0,) * i))) for i in range(4)]
    p = np.array([target((0,) * i) for i in range(5)])
    q = np.array([drafter((0,) * i) for i in range(4)])
    result = benchmark(rule.law, drafts, p, q) if call == "law" else benchmark(rule.verify, drafts, p, q, rng)
    assert np.isclose(result.ends.sum(), 1.0) if call == "law" else 1 <= len(result.emitted) <= 5
    report(benchmark, f"{type(rule).__name__}.{call}", 4, unit)


@pytest.mark.parametrize(
    "rule", [TopDown(Recursive()), TopDown(KSequential()), Traversal(True)], ids=["recursive", "k-seq", "traversal"]
)
@pytest.mark.parametrize("call", ["law", "verify"])
def test_trees(benchmark: Any, models: tuple[Any, Any, float], rule: Any, call: str) -> None:
    target, drafter, unit = models
    rng = np.random.default_rng(0)
    draw = rule.rule.draw if isinstance(rule, TopDown) else Recursive().draw
    tree = draw_tree(SHAPE, target, drafter, draw, rng)
    result = benchmark(rule.law, tree) if call == "law" else benchmark(rule.verify, tree, rng)
    assert np.isclose(result.ends.sum(), 1.0) if call == "law" else 1 <= len(result.emitted) <= 5
    report(benchmark, f"{rule}.{call}", tree.nodes, unit)


def test_a_delayed_tree(benchmark: Any, models: tuple[Any, Any, float]) -> None:
    target, drafter, unit = models
    tree = draw_delayed_tree(DelayedAction(3, 2, 2), target, drafter, np.random.default_rng(0))
    law = benchmark(DelayedExpansion(Recursive("iid"), 2).law, tree)
    assert np.isclose(law.ends.sum(), 1.0)
    report(benchmark, "DelayedExpansion.law", tree.nodes, unit)


@pytest.mark.parametrize(
    "builder", [lambda d: opt_tree(d, 16, 4), lambda d: eagle_tree(d, 16, 4, 4)], ids=["opt", "eagle"]
)
def test_growing_a_tree(benchmark: Any, models: tuple[Any, Any, float], builder: Any) -> None:
    _, drafter, unit = models
    assert len(benchmark(builder, drafter).tokens) == 16
    report(benchmark, "growing, per kept node", 16, unit)


def test_sequoias_programme(benchmark: Any) -> None:
    table = benchmark(tree_table, [0.6, 0.15, 0.08, 0.05, 0.03, 0.02, 0.01, 0.01], 64, 8)
    assert table.shape(64, 8).nodes == 64
