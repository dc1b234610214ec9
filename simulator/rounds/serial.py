"""Serial placement: the drafter drafts, then the verifier verifies, on one device."""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Ints
from simulator.playback.replay import Replay
from simulator.rounds.policy import StoppingPolicy, ask
from simulator.rounds.round import Played, Round
from simulator.trees.trees import Tree


class Serial:
    """Draft, then verify: a round takes draft_s + verify_s.

    drafted = min(what the policy asks for, what the drafter proposes); accepted = min(run length, drafted);
    emitted = min(accepted + 1, output tokens to come). Leviathan et al. 2023, Chen et al. 2023. As exact as the
    replay that answers it. Of a drafter that proposes trees, `drafted` is their depth, and all nodes down to it are
    verified; see `simulator.playback.draft_shapes`.

    A policy may have every slot draft ahead and verify a part only (`drafts_ahead`): drafting is priced in full, and
    `drafted` counts what is verified. With a `tree`, every slot drafts and verifies all its nodes. A round in which
    the policy asks nothing of any slot leaves the drafter idle. With `pad_drafts` a slot verifies as many tokens as
    the policy asked for, whatever its drafter proposed.
    """

    def __init__(self, pad_drafts: bool = False) -> None:
        self._pad_drafts = pad_drafts

    def opened(self, slots: Ints) -> None:
        """Nothing to forget."""

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        if policy.tree is not None:
            return _play_tree(round_, left, policy.tree, replay)
        future = np.minimum(replay.run_length.take(round_.cursor), left)  # beyond the output a recording may go on
        asked, ahead = ask(policy, round_, future), policy.drafts_ahead
        runs = policy.always_drafts or bool(asked.any())
        proposals = None if replay.proposal_length is None else replay.proposal_length.take(round_.cursor)
        drafted = asked if proposals is None else np.minimum(asked, proposals)
        accepted = np.minimum(future, drafted)
        emitted = np.minimum(accepted + 1, left)
        shapes = replay.shapes
        places = None if shapes is None else replay.positions(round_.cursor)
        verified = drafted if shapes is None or places is None else shapes.verified(places, drafted)
        verified = np.maximum(verified, asked) if self._pad_drafts else verified
        tokens = round_.active + int(verified.sum())
        total_context = int(round_.context.sum())
        if ahead is None:
            share = None if shapes is None or places is None else shapes.shares(places, drafted)
            draft_s, verify_s = round_.prices.decode_s(
                drafted if runs else None, round_.context, total_context, verified, share
            )
            return Played(drafted, accepted, emitted, draft_s, verify_s, draft_s + verify_s, tokens)
        whole = np.full(round_.active, ahead, dtype=np.int64)
        whole = whole if proposals is None else np.minimum(whole, proposals)
        share = None if shapes is None or places is None else shapes.shares(places, whole)
        draft_s, verify_s = round_.prices.partly_verified_s(whole, verified, round_.context, total_context, share)
        extra = {"drafted_ahead": float(whole.sum())}
        return Played(drafted, accepted, emitted, draft_s, verify_s, draft_s + verify_s, tokens, extra)


def _play_tree(round_: Round, left: Ints, tree: Tree, replay: Replay) -> Played:
    """Play a round in which every slot drafts and verifies `tree`; `drafted` counts nodes."""
    accepted = np.minimum(tree.accepted(replay.positions(round_.cursor)), left)
    emitted = np.minimum(accepted + 1, left)
    drafted = np.full(round_.active, tree.nodes, dtype=np.int64)
    draft_s, verify_s, outside = tree.seconds(round_.prices, round_.active, int(round_.context.sum()))
    round_.prices.extrapolated_iterations += outside
    tokens = round_.active * (tree.nodes + 1)
    return Played(drafted, accepted, emitted, draft_s, verify_s, draft_s + verify_s, tokens)
