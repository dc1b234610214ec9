"""Draft trees: their shapes, which of their nodes lie on the text, and what they cost.

A node is the drafter's child of some rank (0: its first choice) after its parent; the root is the last committed
token and no node. Greedy: a node lies on the text iff, at every depth d of its path, the child's rank equals the rank
of x_{t+d} under the drafter (`emitted_rank`). The deepest such node gives the accepted length, bonus excluded. For a
drafter that sees tokens alone this replays any static tree exactly: every context on such a path is a prefix of the
text. Sampled decoding needs the drafter's whole distributions, which no trace holds.

Dynamic draft trees in the manner of EAGLE-2: an approximation.

Sequoia's dynamic programme for scenarios: what cannot be is a fault of the scenario.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CalibrationError, ReplayError, ScenarioError
from calibration.verification import builders
from calibration.verification import trees as shapes
from calibration.verification.builders import eagle_bars, eagle_candidates
from simulator.playback.signals import DrafterRecording, make_signals
from simulator.pricing.costs import DraftFraction, DraftPerStep, Prices


class TreeShape(shapes.TreeShape):
    """The static tree that a scenario names: what is no tree is a fault of the scenario."""

    def __post_init__(self) -> None:
        """Refuse what is not a tree."""
        try:
            super().__post_init__()
        except CalibrationError as fault:
            raise ScenarioError(f"stopping.shape.{fault}") from None

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> Self:
        """Give the tree of nodes named by their paths of ranks; every prefix of a path must be there."""
        try:
            return super().from_paths(paths)
        except CalibrationError as fault:
            raise ScenarioError(f"stopping.shape.{fault}") from None


class Tree:
    """A tree compiled for the sequences served: accepted lengths by recorded place, and prices.

    `nodes` are verified in every round beside the root; `depth` bounds the accepted length; `widths` are the nodes
    that the drafter runs in each of its steps.
    """

    def __init__(self, accepted: Ints, nodes: int, depth: int, widths: Sequence[int]) -> None:
        self.nodes, self.depth, self.widths = nodes, depth, tuple(widths)
        self._accepted = accepted

    def accepted(self, places: Ints) -> Ints:
        """Give accepted lengths, bonus excluded, at recorded places (`Replay.positions` of cursors)."""
        return self._accepted[places]

    def seconds(self, prices: Prices, batch: int, total_context: int) -> tuple[float, float, bool]:
        """Give (draft seconds, verify seconds, whether outside of the measured range) of a round.

        Every slot drafts and verifies the whole tree. A draft step runs `widths` nodes of every slot in lock step, on
        the context and the nodes run before; one verifier step reads all nodes and the root.
        """
        verify_s, outside = prices.verify_s(batch, batch * (self.nodes + 1), total_context)
        draft = prices.draft
        if draft is None:
            return 0.0, verify_s, outside
        if isinstance(draft, DraftFraction):
            return draft.seconds(np.empty(0, np.int64), np.empty(0, np.int64), verify_s)[0], verify_s, outside
        if not isinstance(draft, DraftPerStep):
            new = batch * self.nodes if draft.tokens else batch
            draft_s = float(draft.step.step_seconds(batch, new, total_context))
            return draft_s, verify_s, outside or draft.step.outside(batch, new, total_context)
        new_tokens = batch * np.array(self.widths)
        cached = total_context + np.concatenate(([0], np.cumsum(new_tokens)[:-1]))
        draft_s = float(np.sum(draft.step.step_seconds(batch, new_tokens, cached)))
        widest = int(np.argmax(new_tokens))
        edges = {0, widest, len(new_tokens) - 1}
        beyond = any(draft.step.outside(batch, float(new_tokens[j]), float(cached[j])) for j in sorted(edges))
        return draft_s, verify_s, outside or beyond


def recorded_ranks(material: DrafterRecording) -> Ints:
    """Give the rank of every token of the text under the drafter, -1 where it was not recorded and is not needed.

    Raises `ReplayError` where a tree cannot be replayed: sampled decoding, a drafter that proposes given tokens, or
    ranks that were not recorded.
    """
    name = material.drafter
    if not material.greedy:
        raise ReplayError(
            f"stopping.policy: 'tree' replays greedy traces only; those of drafter '{name}' are sampled"
        )
    if material.info.deterministic:
        raise ReplayError(
            f"stopping.policy: 'tree' needs a drafter that ranks tokens; '{name}' ({material.info.paradigm}) "
            "proposes given ones"
        )
    (rank,) = material.columns("emitted_rank")
    material.whole("emitted_rank", rank, "policy 'tree'")
    return np.where(np.isnan(rank), -1, rank).astype(np.int64)


def static_tree(material: DrafterRecording, shape: TreeShape) -> Tree:
    """Compile a static tree; exact for greedy traces of drafters that see tokens alone."""
    accepted = shape.accepted(recorded_ranks(material), material.lengths)
    return Tree(accepted, shape.nodes, int(shape.depths.max()), shape.widths)


def rank_frequencies(material: DrafterRecording, ranks: int) -> Floats:
    """Give how often the text's next token has rank 0 .. `ranks` - 1 under the drafter, over all recorded places.

    Sequoia's acceptance vector, positional and free of context, under greedy decoding.
    """
    rank = recorded_ranks(material)[material.needed]
    return np.bincount(rank[rank < ranks], minlength=ranks) / len(rank)


_CHUNK = 4096
"""Places worked on at once, to bound memory."""
_RATIOS = 1 - np.geomspace(1e-6, 1.0, 400)[::-1]
"""Grid of ratios of the geometric tail, from 0 to almost 1."""


def rank_probabilities(confidence: Floats, entropy: Floats, ranks: int) -> Floats:
    """Give probabilities of ranks 0 .. `ranks` - 1 along a new last axis, from the largest one and the entropy.

    Rank 0 has the confidence c; the rest falls geometrically, q_r = (1 - c) (1 - g) g^(r-1), no larger than c, with g
    such that the entropy is right: H = h(c) + (1 - c) (-ln(1 - g) - g ln(g) / (1 - g)), h the entropy of a coin.
    An assumption: the recording holds the two numbers alone.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        tails = -np.log(1 - _RATIOS) - np.where(_RATIOS > 0, _RATIOS * np.log(_RATIOS) / (1 - _RATIOS), 0.0)
        rest = np.clip(1 - confidence, 1e-9, 1.0)
        coin = -rest * np.log(rest) - np.where(rest < 1, (1 - rest) * np.log(1 - rest), 0.0)
    ratio = np.interp((entropy - coin) / rest, tails, _RATIOS)
    powers = np.power(ratio[..., None], np.arange(max(ranks - 1, 0)))
    later = np.minimum((rest * (1 - ratio))[..., None] * powers, confidence[..., None])
    return np.concatenate([confidence[..., None], later], axis=-1)[..., :ranks]


def dynamic_tree(material: DrafterRecording, total_tokens: int, depth: int, top_k: int) -> Tree:
    """Compile EAGLE-2's tree (Li et al. 2024, arXiv 2406.16858) for every place of the recording.

    The rule: each of the `top_k` best nodes of a level, by the product of draft probabilities along its path, gets
    its `top_k` likeliest children, `depth` levels deep; of all of them the `total_tokens` best are verified. A node
    of the text is accepted if it and its ancestors are among them.

    Approximate in two ways: probabilities of ranks above 0 are those of `rank_probabilities`; and nodes of one level
    off the drafter's own chain are given the children's probabilities of that chain at the same level. Ranks of the
    text's tokens, and probabilities along the text and along the chain, are recorded (the chain behind its first
    wrong token as far as `simulator.playback.signals` has it). Raises `ReplayError` where these are missing.
    """
    if total_tokens > eagle_candidates(depth, top_k):
        raise ScenarioError(
            f"stopping.shape.total_tokens: must be at most {eagle_candidates(depth, top_k)}, as many nodes as top_k "
            f"and depth give, got {total_tokens}"
        )
    rank = recorded_ranks(material)
    signals = make_signals(_Recording(material), material)
    confidence, entropy = material.columns("drafter_confidence", "drafter_entropy")
    accepted = np.zeros(len(rank), dtype=np.int64)
    for places in np.array_split(material.needed, max(1, len(material.needed) // _CHUNK)):
        chain = rank_probabilities(signals.confidence(places, depth), signals.entropy(places, depth), top_k)
        bars = eagle_bars(chain, total_tokens, top_k)
        accepted[places] = _walk(material, places, rank, (confidence, entropy), bars, top_k)
    return Tree(accepted, total_tokens, depth, (1, *[top_k] * (depth - 1)))


class _Recording:
    """The recording itself, as signals ask for it."""

    def __init__(self, material: DrafterRecording) -> None:
        (runs,) = material.columns("run_length")
        self.run_length = np.nan_to_num(runs).astype(np.int64)

    def positions(self, cursors: Ints) -> Ints:
        """Give `cursors`: they are places of the recording."""
        return cursors


def _walk(
    material: DrafterRecording,
    places: Ints,
    rank: Ints,
    recorded: tuple[Floats, Floats],
    bars: tuple[Floats, Floats],
    top_k: int,
) -> Ints:
    """Give how deep the text's own path stays in the tree."""
    to_come = (material.starts + material.lengths)[material.owners[places]] - places
    kept, expanded = bars
    probability, alive = np.ones(len(places)), np.ones(len(places), dtype=bool)
    accepted = np.zeros(len(places), dtype=np.int64)
    slack = 1 - 1e-9  # the same product, multiplied in another order
    for level in range(expanded.shape[1]):
        here = np.minimum(places + level, len(rank) - 1)
        alive &= (level < to_come) & (rank[here] < top_k)
        shares = rank_probabilities(recorded[0][here], recorded[1][here], top_k)
        probability = probability * shares[np.arange(len(here)), np.clip(rank[here], 0, top_k - 1)]
        alive &= probability >= kept * slack
        accepted += alive
        alive &= probability >= expanded[:, level] * slack
    return accepted


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
