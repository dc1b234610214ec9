"""Verification of drafted tokens on probability arrays: exact laws, samplers, and how much each rule accepts.

Pure numpy, usable by itself. Rules that verify k drafts at one position share one shape (`Rule`): `draw` the drafts,
`verify` them, their exact `law`, the exact `acceptance` over all drafts. Rules that verify a chain or a tree share
another, over whole rounds (`RoundLaw`). Lossless rules say so in `lossless`; the others are in `lossy`.
"""

from calibration.verification.builders import (
    GrownTree,
    TreeTable,
    eagle_bars,
    eagle_candidates,
    eagle_tree,
    opt_tree,
    tree_table,
)
from calibration.verification.chains import BlockVerification, TokenLevel, TokenLevelChain
from calibration.verification.common import (
    Drafting,
    Law,
    NextToken,
    RoundLaw,
    RoundVerdict,
    Rule,
    Verdict,
    residual,
    total_variation,
)
from calibration.verification.delayed import (
    DelayedAction,
    DelayedExpansion,
    best_action,
    draw_delayed_tree,
    merge_branches,
)
from calibration.verification.greedy import Greedy, Naive
from calibration.verification.gumbel import (
    BeamNode,
    draw_drafts,
    draw_iid,
    gumbel_top_k,
    stochastic_beam_search,
    top_k,
    without_replacement_probability,
)
from calibration.verification.lossy import Judge, Lenient, Thresholds, Typical
from calibration.verification.optimal import (
    Coupling,
    GreedyDrafts,
    KSequential,
    OptimalTransport,
    division_factor,
    optimal_coupling,
)
from calibration.verification.race import inclusion_probabilities
from calibration.verification.recursive import AcceptanceEstimate, Recursive, TopDown, estimate_acceptance
from calibration.verification.traversal import Traversal
from calibration.verification.trees import DraftTree, TreeShape, draft_tuples, draw_tree, enumerate_trees

__all__ = [
    "AcceptanceEstimate",
    "BeamNode",
    "BlockVerification",
    "Coupling",
    "DelayedAction",
    "DelayedExpansion",
    "DraftTree",
    "Drafting",
    "Greedy",
    "GreedyDrafts",
    "GrownTree",
    "Judge",
    "KSequential",
    "Law",
    "Lenient",
    "Naive",
    "NextToken",
    "OptimalTransport",
    "Recursive",
    "RoundLaw",
    "RoundVerdict",
    "Rule",
    "Thresholds",
    "TokenLevel",
    "TokenLevelChain",
    "TopDown",
    "Traversal",
    "TreeShape",
    "TreeTable",
    "Typical",
    "Verdict",
    "best_action",
    "division_factor",
    "draft_tuples",
    "draw_delayed_tree",
    "draw_drafts",
    "draw_iid",
    "draw_tree",
    "eagle_bars",
    "eagle_candidates",
    "eagle_tree",
    "enumerate_trees",
    "estimate_acceptance",
    "gumbel_top_k",
    "inclusion_probabilities",
    "merge_branches",
    "opt_tree",
    "optimal_coupling",
    "residual",
    "stochastic_beam_search",
    "top_k",
    "total_variation",
    "tree_table",
    "without_replacement_probability",
]
