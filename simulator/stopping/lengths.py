"""Draft lengths that need no estimate: one, or one for each range of batch sizes.

Also the schedule of transformers' assisted generation, a tree in every round, and oracles, which know what will be
accepted and bound what an engine can do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibration.common.arrays import Ints
from simulator.rounds.protocols import OraclePolicy, Played, Policy, Round, capped_seconds
from simulator.trees.trees import Tree


class Fixed(Policy):
    """The same draft length k always; exact replay of greedy traces, exact in distribution of sampled ones."""

    def __init__(self, draft_tokens: int, max_num_seqs: int) -> None:
        self.longest_draft = draft_tokens
        self._lengths = np.full(max_num_seqs, draft_tokens, dtype=np.int64)

    def draft_tokens(self, round_: Round) -> Ints:
        """Give k for every slot."""
        return self._lengths[: round_.active]


class ByBatch(Policy):
    """A draft length for each range of batch sizes, ``[first, last, K]``; as exact as `Fixed`.

    vLLM's `num_speculative_tokens_per_batch_size` (dynamic speculative decoding): the batch size is the number of
    requests scheduled in the step; sizes beyond the table take its last K.
    """

    def __init__(self, table: Sequence[tuple[int, int, int]], max_num_seqs: int) -> None:
        self.longest_draft = max(draft_tokens for _, _, draft_tokens in table)
        by_size = np.full(max_num_seqs + 1, table[-1][2], dtype=np.int64)
        for first, last, draft_tokens in table:
            by_size[first : last + 1] = draft_tokens
        self._by_size: list[int] = by_size.tolist()

    def draft_tokens(self, round_: Round) -> Ints:
        """Give the K of this batch size for every slot."""
        return np.full(round_.active, self._by_size[round_.active], dtype=np.int64)


class Heuristic(Policy):
    """k grows by 2 where every drafted token matched and falls by 1, not below 1, where one did not.

    transformers, `AssistedCandidateGenerator.update_candidate_strategy`, schedule ``heuristic_transient``: every
    request starts anew (``heuristic`` carries k over to the next call, which in a batch of requests means nothing). A
    round in which nothing was drafted teaches nothing. transformers knows no cap but the longest output; here
    `max_draft_tokens` is one. Exact replay of greedy traces, exact in distribution of sampled ones.
    """

    def __init__(self, start_tokens: int, max_draft_tokens: int, max_num_seqs: int) -> None:
        self.longest_draft = max_draft_tokens
        self._longest = max_draft_tokens
        self._start = start_tokens
        self._lengths = np.full(max_num_seqs, start_tokens, dtype=np.int64)

    def opened(self, slots: Ints) -> None:
        """Start these anew."""
        self._lengths[slots] = self._start

    def draft_tokens(self, round_: Round) -> Ints:
        """Give each slot's current k."""
        return self._lengths[round_.slots]

    def observe(self, round_: Round, played: Played) -> None:
        """Step k up or down."""
        step = np.where(played.accepted == played.drafted, 2, -1)
        step[played.drafted == 0] = 0
        self._lengths[round_.slots] = np.clip(self._lengths[round_.slots] + step, 1, self._longest)


class Oracle(OraclePolicy):
    """Drafts exactly as many tokens as will be accepted: an oracle, no engine can do it; its replay is exact.

    No draft token is wasted and every round emits as much as it can, so it bounds the accepted tokens of every
    chain policy from above. It does not bound time where drafting an accepted token costs more than verifying one.
    The drafter runs every round, as in the published simulation of this oracle (SpecDecode-Bench).
    """

    always_drafts = True

    def foreseen_tokens(self, round_: Round, run_length: Ints) -> Ints:
        """Give the true run lengths."""
        return run_length


class OracleCost(OraclePolicy):
    """Drafts min(n_i, L) with the L that gives this round the most tokens per second: an oracle.

    n_i is the true run length of slot i, so that a draft of k <= n_i tokens emits k + 1. Where a verified token and a
    slot more in a draft step cost the same whatever the others do (linear costs), one L for all slots is as good as
    any set of lengths: the slots of one depth all pay or none does, and deeper steps never have more slots. It is
    the best choice round by round; what a choice does to later rounds it does not weigh.
    """

    def foreseen_tokens(self, round_: Round, run_length: Ints) -> Ints:
        """Give the lengths of the best depth."""
        runs = run_length
        seconds = capped_seconds(round_, runs)
        depth = np.arange(1, len(seconds))
        still = np.count_nonzero(runs[:, None] >= depth, axis=0)
        tokens = round_.active + np.concatenate(([0], np.cumsum(still)))
        return np.minimum(runs, int(np.argmax(tokens / seconds)))


class TreeDraft(Policy):
    """The same kind of tree in every round; exactness: see `simulator.trees.trees`, `simulator.trees.trees`.

    A placement replays and prices `tree` and does not ask for a draft length. `longest_draft` counts nodes: so many
    KV slots are needed ahead.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._nodes = self.longest_draft = tree.nodes

    def draft_tokens(self, round_: Round) -> Ints:
        """Give the number of nodes for every slot."""
        return np.full(round_.active, self._nodes, dtype=np.int64)
