"""Builders of draft trees: Sequoia's dynamic programme, OPT-Tree, EAGLE-2's dynamic tree, stochastic beams."""

from calibration.verification.eagle_builder import eagle_bars, eagle_candidates, eagle_tree
from calibration.verification.grown_builder import GrownTree
from calibration.verification.opt_tree_builder import opt_tree
from calibration.verification.sequoia_builder import TreeTable, tree_table

__all__ = ["GrownTree", "TreeTable", "eagle_bars", "eagle_candidates", "eagle_tree", "opt_tree", "tree_table"]
