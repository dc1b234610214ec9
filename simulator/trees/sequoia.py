"""Sequoia's dynamic programme for scenarios: what cannot be is a fault of the scenario."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.common.errors import CalibrationError, ScenarioError
from calibration.verification import builders
from simulator.trees.trees import TreeShape


class TreeTable(builders.TreeTable):
    """`calibration.verification.builders.TreeTable`, its shapes those that a scenario names."""

    def shape(self, nodes: int, depth: int) -> TreeShape:
        """Give a best tree of `nodes` drafted nodes, at most `depth` deep (the root not counted in either)."""
        try:
            return TreeShape.from_paths(self.paths(nodes, depth))
        except CalibrationError as fault:
            raise ScenarioError(f"stopping.shape: {fault}") from None


def tree_table(acceptance: Sequence[float], nodes: int, depth: int) -> TreeTable:
    """Give `calibration.verification.builders.tree_table` of a scenario's acceptance by rank."""
    table = builders.tree_table(acceptance, nodes, depth)
    return TreeTable(table.acceptance, table.by_children, table.left)
