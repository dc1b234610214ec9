"""Builders of draft trees: Sequoia's dynamic programme, OPT-Tree, EAGLE-2's dynamic tree, stochastic beams."""

from calibration.verification.builders.eagle import eagle_bars, eagle_candidates, eagle_tree
from calibration.verification.builders.grown import GrownTree
from calibration.verification.builders.opt_tree import opt_tree
from calibration.verification.builders.sequoia import TreeTable, tree_table

__all__ = ["GrownTree", "TreeTable", "eagle_bars", "eagle_candidates", "eagle_tree", "opt_tree", "tree_table"]
