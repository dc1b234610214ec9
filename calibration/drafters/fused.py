"""Retrieval fused with a model's draft (RASD): a retrieved tree, pruned by the model, joined with its own chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.drafters.given import GivenDrafter, packed_drafts, proposal
from calibration.drafters.lanes import ModelDrafter, ModelSide
from calibration.drafters.pairs import Pair, rows_of, start_drafts
from calibration.models.drafter import Drafts, Opening, Proposal, Read, Side, Tap
from calibration.models.lane import Lane
from calibration.models.sampling import processed
from calibration.proposers import Draft, draft_trees
from calibration.traces.manifest import DecodingInfo

_NODES = 256
"""Nodes of retrieved trees that the model reads in one pass of a recording, if not one tree alone has more."""


@dataclass(frozen=True)
class FusedDrafter(Pair):
    """`first` retrieves, `second` prunes and drafts; greedy decoding alone, where its replay is exact.

    Pruning: the branches of the `top` first tokens stay; where `top` is None, the nodes whose path has at least
    `min_probability` under the model. `step` leaves out the pass in which it reads the tree, once a round.
    """

    first: GivenDrafter
    second: ModelDrafter
    top: int | None
    min_probability: float

    def side(self, opening: Opening) -> Side:
        """Begin drafting for a batch."""
        self.refuse(opening.decoding, "fused drafts must be given tokens")
        return _FusedSide(self, opening)

    def drafts(self, read: Read, depth: int, generator: torch.Generator) -> Drafts:
        """Give the drafts from every start; the model reads the text once more, and with it the retrieved trees."""
        self.refuse(read.decoding, "fused drafts must be given tokens")
        limit, prompt, count = min(depth, self.depth), len(read.prompt_ids), len(read.output_ids)
        chains = rows_of(start_drafts(self.second, read, limit, generator))
        trees = rows_of(self.first.drafts(read, self.depth, generator))
        lane = Lane(self.second.model, 1, window=self.second.window)
        text = torch.tensor([[*read.prompt_ids, *read.output_ids[:-1]]], device=lane.device)
        logits = lane.feed(text, last=count)[0]
        found: list[Draft] = []
        for part in _chunks(trees):
            column = torch.arange(lane.kept.shape[1], device=lane.device)
            here = torch.arange(part.start, part.stop, device=lane.device)
            forest = Forest([trees[part]], column < (prompt + here)[None, :, None], (prompt + here)[None])
            found += self.pruned(lane, forest, logits[None, part], read.decoding)[0]
        fused = [draft_trees.fuse(a, draft_trees.cut(b, limit)) for a, b in zip(chains, found, strict=True)]
        return packed_drafts(fused)

    def pruned(self, lane: Lane, forest: Forest, logits: Tensor, decoding: DecodingInfo) -> list[list[Draft]]:
        """Prune the trees of each row; `logits` [rows, trees, vocabulary] are those of their first tokens."""
        if self.top is not None:
            best = logits.topk(min(self.top, logits.shape[-1])).indices.tolist()
            return [
                [draft_trees.prune(t, allowed_first_tokens=set(b)) for t, b in zip(trees, tops, strict=True)]
                for trees, tops in zip(forest.trees, best, strict=True)
            ]
        told = path_probabilities(lane, forest, logits, decoding)
        return [
            [
                draft_trees.prune(tree, path_probabilities=paths, min_probability=self.min_probability)
                for tree, paths in zip(trees, row, strict=True)
            ]
            for trees, row in zip(forest.trees, told, strict=True)
        ]


class _FusedSide(ModelSide):
    """The model's side, whose logits and cache prune what was retrieved before it drafts its chain."""

    def __init__(self, drafter: FusedDrafter, opening: Opening) -> None:
        super().__init__(drafter.second, opening.prompts, opening.first, opening.decoding)
        self._drafter, self._opening = drafter, opening
        self._retrieval = drafter.first.side(opening)

    def draft(self, gamma: int, generator: torch.Generator) -> Proposal:
        """Propose up to `gamma` tokens deep per row."""
        drafter, lane = self._drafter, self._lane
        limit = min(gamma, drafter.depth)
        trees = rows_of(self._retrieval.draft(drafter.depth, generator))
        logits = self._catch_up()
        forest = Forest([[tree] for tree in trees], lane.kept[:, None], lane.kept.sum(1)[:, None])
        pruned = drafter.pruned(lane, forest, logits[:, None], self._decoding)
        chains = rows_of(self._draft_from(logits, limit, generator))
        fused = [draft_trees.fuse(a, draft_trees.cut(b, limit)) for a, (b,) in zip(chains, pruned, strict=True)]
        return proposal(fused, self._opening)

    def commit(self, emitted: Sequence[Sequence[int]], states: Mapping[Tap, Sequence[Tensor]]) -> None:
        """Let both take in the emitted tokens."""
        self._retrieval.commit(emitted, states)
        super().commit(emitted, states)


@dataclass(frozen=True)
class Forest:
    """Trees that a lane reads: of each row, `trees`, which columns they follow and where their first tokens stand.

    ``visible`` bool [rows, trees, columns fed so far], ``position`` [rows, trees].
    """

    trees: Sequence[Sequence[Draft]]
    visible: Tensor
    position: Tensor


def path_probabilities(lane: Lane, forest: Forest, logits: Tensor, decoding: DecodingInfo) -> list[list[list[float]]]:
    """Give the model's probability of the path to every node of every tree, in one pass over all nodes.

    `logits` [rows, trees, vocabulary]: those of the first tokens. The columns read stay in the cache, kept by no row.
    """
    rows = len(forest.trees)
    width = max(sum(len(tree.tokens) for tree in trees) for trees in forest.trees)
    if not width:
        return [[[] for _ in trees] for trees in forest.trees]
    columns, device = forest.visible.shape[2], lane.device
    tokens = torch.zeros(rows, width, dtype=torch.long, device=device)
    position = torch.zeros_like(tokens)
    allowed = torch.zeros(rows, width, columns + width, dtype=torch.bool, device=device)
    source = torch.zeros_like(tokens)  # the place of the logits that a node is drawn from: nodes, then trees
    for row, trees in enumerate(forest.trees):
        begin = 0
        for number, tree in enumerate(trees):
            up = range(-1, len(tree.tokens) - 1) if tree.parents is None else tree.parents
            for node, (token, parent) in enumerate(zip(tree.tokens, up, strict=True), begin):
                above = begin + parent
                tokens[row, node] = token
                if parent < 0:
                    allowed[row, node, :columns] = forest.visible[row, number]
                    position[row, node], source[row, node] = forest.position[row, number], width + number
                else:
                    allowed[row, node] = allowed[row, above]
                    position[row, node], source[row, node] = position[row, above] + 1, above
                allowed[row, node, columns + node] = True
            begin += len(tree.tokens)
    read = lane.forward(tokens, position, allowed)
    lane.kept = torch.cat([lane.kept, torch.zeros(rows, width, dtype=torch.bool, device=device)], 1)
    return _products(forest, torch.cat([read, logits], 1), tokens, source, decoding)


def _products(
    forest: Forest, logits: Tensor, tokens: Tensor, source: Tensor, decoding: DecodingInfo
) -> list[list[list[float]]]:
    """Multiply the probabilities along the paths."""
    row = torch.arange(len(tokens), device=tokens.device)[:, None]
    step = processed(logits, decoding)[row, source, tokens].clamp(max=1.0).double().tolist()
    found = []
    for trees, values in zip(forest.trees, step, strict=True):
        mine, begin = [], 0
        for tree in trees:
            up = range(-1, len(tree.tokens) - 1) if tree.parents is None else tree.parents
            paths: list[float] = []
            for value, parent in zip(values[begin : begin + len(tree.tokens)], up, strict=True):
                paths.append(value if parent < 0 else paths[parent] * value)
            mine.append(paths)
            begin += len(tree.tokens)
        found.append(mine)
    return found


def _chunks(trees: Sequence[Draft]) -> list[slice]:
    """Cut the starts into runs of few enough nodes."""
    found, begin, nodes = [], 0, 0
    for start, tree in enumerate(trees):
        if nodes and nodes + len(tree.tokens) > _NODES:
            found.append(slice(begin, start))
            begin, nodes = start, 0
        nodes += len(tree.tokens)
    return [*found, slice(begin, len(trees))]
