"""Recording of proposers: what they propose at every position of a text, and how far it is accepted.

Exact in greedy and in sampled decoding: a proposal is a given string or tree of given tokens, accepted as far as the
trajectory follows it. (Sampled: given tokens have q = 1, so that each is accepted with probability p, which is to say
whenever the verifier's own draw is that token.) Since proposals depend on committed tokens alone and shorter drafts
are cuts of longer ones, a round that starts at t with drafts of k tokens accepts min(run[t], k), whatever the rounds
before it were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.proposers.draft_trees import accepted, depth, nodes_by_depth
from calibration.proposers.protocol import Draft, Proposer


@dataclass(frozen=True)
class ProposalRuns:
    """Acceptance of the proposals at every position of one output of T tokens; lengths exclude the bonus token.

    `run` [T]: how many tokens deep the text follows the proposal. `depth` [T]: how deep the proposal is. `nodes` [T,
    D]: how many nodes it has down to depth 1 .. D, D the greatest depth of all: what a cut at that depth verifies.
    """

    run: NDArray[np.int64]
    depth: NDArray[np.int64]
    nodes: NDArray[np.int64]


def proposals(proposer: Proposer, prompt: Sequence[int], output: Sequence[int], max_draft_tokens: int) -> list[Draft]:
    """Give what a fresh `proposer` drafts at every position t of `output`, which is given `prompt` and output[:t]."""
    proposer.extend(prompt)
    drafts = []
    for token in output:
        drafts.append(proposer.propose(max_draft_tokens))
        proposer.extend([token])
    return drafts


def run_lengths(drafts: Sequence[Draft], output: Sequence[int]) -> ProposalRuns:
    """Compare the proposals at every position with the text; the last runs end with it."""
    if len(drafts) != len(output):
        raise ValueError(f"drafts: must hold one a position ({len(output)}), got {len(drafts)}")
    deep = np.array([depth(draft) for draft in drafts], dtype=np.int64)
    nodes = np.zeros((len(drafts), int(deep.max(initial=0))), dtype=np.int64)
    run = np.zeros(len(drafts), dtype=np.int64)
    for t, draft in enumerate(drafts):
        nodes[t, : deep[t]] = nodes_by_depth(draft)
        run[t] = accepted(draft, output[t : t + int(deep[t])])
    return ProposalRuns(run, deep, nodes.cumsum(axis=1))
