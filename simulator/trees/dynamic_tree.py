"""Dynamic draft trees in the manner of EAGLE-2: an approximation."""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ScenarioError
from calibration.verification.builders import eagle_bars, eagle_candidates
from simulator.playback.recorded import Material
from simulator.playback.signals import make_signals
from simulator.trees.trees import Tree, recorded_ranks

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


def dynamic_tree(material: Material, total_tokens: int, depth: int, top_k: int) -> Tree:
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

    def __init__(self, material: Material) -> None:
        (runs,) = material.columns("run_length")
        self.run_length = np.nan_to_num(runs).astype(np.int64)

    def positions(self, cursors: Ints) -> Ints:
        """Give `cursors`: they are places of the recording."""
        return cursors


def _walk(
    material: Material,
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
