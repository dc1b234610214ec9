"""Drafters made of two: one before the other (`Before`), or both at once (`Merged`).

Every round both parts take in what was emitted, also where they did not draft or where what they drafted was not
used; so each proposes what it would have proposed alone. Which of them drafts, and what is kept of it, is decided on
drafts of full depth, whatever length is asked for: a shorter draft is the longer one cut.

Retrieval fused with a model's draft (RASD): a retrieved tree, pruned by the model, joined with its own chain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.drafters.given import GivenDrafter, packed_drafts, proposal
from calibration.drafters.lanes import ModelDrafter, ModelSide
from calibration.models.drafter import Drafter, Drafts, Opening, Proposal, Read, Side, StartDrafter, Tap, followed
from calibration.models.lane import Lane
from calibration.models.sampling import processed
from calibration.proposers import Draft, draft_trees
from calibration.traces.manifest import DecodingInfo, DrafterInfo


@dataclass(frozen=True)
class Pair:
    """What drafters of two parts share."""

    info: DrafterInfo
    first: Drafter
    second: Drafter

    @property
    def name(self) -> str:
        """Name in the manifest."""
        return self.info.name

    @property
    def model(self) -> None:
        """It is no single model."""
        return None

    @property
    def parts(self) -> tuple[Drafter, ...]:
        """Both drafters."""
        return self.first, self.second

    @property
    def taps(self) -> tuple[Tap, ...]:
        """States of the verifier that either of them reads."""
        return tuple(dict.fromkeys((*self.first.taps, *self.second.taps)))

    @property
    def depth(self) -> int:
        """The longest draft in tokens."""
        assert self.info.max_draft_tokens is not None
        return self.info.max_draft_tokens

    def step(self, batch: int, context_tokens: int, noise: torch.Generator) -> Callable[[], float]:
        """Give a function that runs one step of both, one after the other."""
        steps = [part.step(batch, context_tokens, noise) for part in self.parts]
        return lambda: sum(step() for step in steps)

    def refuse(self, decoding: DecodingInfo, why: str) -> None:
        """Raise `CalibrationError` in sampled decoding, unless all drafts are given tokens."""
        if decoding.mode == "sampled" and not self.info.deterministic:
            raise CalibrationError(f"drafter '{self.name}': {why} in sampled decoding, got {self.info.paradigm}")


@dataclass(frozen=True)
class Before(Pair):
    """`first` drafts where it proposes at least `least_tokens` tokens, else `second`.

    Greedy: exact. Sampled: exact in distribution; both must draft chains there, or both given tokens, since a tree
    of given tokens and a chain that was drawn are verified by different rules.
    """

    least_tokens: int

    def side(self, opening: Opening) -> Side:
        """Begin drafting for a batch."""
        return _BeforeSide(self, opening)

    def drafts(self, read: Read, depth: int, generator: torch.Generator) -> Drafts:
        """Give the drafts from every start.

        ``layers``: none for tokens of `first` where `second` is a model, so that a draft is priced as the model's
        part of it.
        """
        own = start_drafts(self.first, read, self.depth, generator)
        if own.parents is not None:
            self.refuse(read.decoding, "first must propose chains")
        theirs = start_drafts(self.second, read, min(depth, self.depth), generator)
        mine, others = rows_of(own), rows_of(theirs)
        used = np.array([self.takes(draft) for draft in mine])
        chosen = [a if use else b for a, b, use in zip(mine, others, used, strict=True)]
        packed = packed_drafts([draft_trees.cut(draft, depth) for draft in chosen])
        if self.info.deterministic:
            return packed
        return self._felt(packed, theirs, used, read)

    def takes(self, draft: Draft) -> bool:
        """Whether `draft` of the first is long enough."""
        return draft_trees.depth(draft) >= self.least_tokens

    def _felt(self, packed: Drafts, theirs: Drafts, used: NDArray[np.bool_], read: Read) -> Drafts:
        """Add what is known of the second's drafts; given tokens have no confidence, and are the text's or not."""
        width, mine = packed.tokens.shape[1], used[:, None]

        def felt(values: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if values is None else np.where(mine, np.nan, fitted(values, width)).astype(np.float32)

        text = np.array([*read.output_ids, *[-2] * width], dtype=np.int64)
        layers = self.info.layers or 0
        whole = np.where(packed.tokens >= 0, layers, 0) if theirs.layers is None else fitted(theirs.layers, width)
        found = replace(
            packed,
            confidence=felt(theirs.confidence),
            entropy=felt(theirs.entropy),
            layers=np.where(mine, 0, whole).astype(np.int32) if layers else None,
        )
        if theirs.accept is None:
            return found
        ahead = np.lib.stride_tricks.sliding_window_view(text, width)[: len(used)] if width else packed.tokens
        hits = np.where(ahead < 0, np.nan, packed.tokens == ahead)
        accept = np.where(mine, hits, fitted(theirs.accept, width)).astype(np.float32)
        runs = None
        if theirs.runs is not None:
            runs = np.where(used, followed(packed, np.array(read.output_ids, dtype=np.int64)), theirs.runs)
        return replace(found, accept=accept, runs=runs)


class _BeforeSide:
    """Both sides; the second drafts in rounds in which some row needs it."""

    def __init__(self, pair: Before, opening: Opening) -> None:
        self._pair, self._opening = pair, opening
        self._first, self._second = pair.first.side(opening), pair.second.side(opening)

    def draft(self, gamma: int, generator: torch.Generator) -> Proposal:
        """Propose up to `gamma` tokens deep per row."""
        pair, limit = self._pair, min(gamma, self._pair.depth)
        found = self._first.draft(pair.depth, generator)
        if found.parents is not None:
            pair.refuse(self._opening.decoding, "first must propose chains")
        mine = rows_of(found)
        used = [pair.takes(draft) for draft in mine]
        mine = [draft_trees.cut(draft, limit) for draft in mine]
        if all(used):
            return proposal(mine, self._opening)
        theirs = self._second.draft(limit, generator)
        chosen = [a if use else b for a, b, use in zip(mine, rows_of(theirs), used, strict=True)]
        mixed = proposal(chosen, self._opening)
        if mixed.q is None or theirs.q is None:
            return mixed
        use = torch.tensor(used, device=mixed.q.device)[:, None, None]
        return replace(mixed, q=torch.where(use, mixed.q, _widened(theirs.q, mixed.q.shape[1])))

    def commit(self, emitted: Sequence[Sequence[int]], states: Mapping[Tap, Sequence[Tensor]]) -> None:
        """Let both take in the emitted tokens."""
        self._first.commit(emitted, states)
        self._second.commit(emitted, states)


@dataclass(frozen=True)
class Merged(Pair):
    """Both draft; `choose` says whether the union of their trees is verified or the one of larger mean confidence.

    Greedy: exact; the union accepts what the better of both accepts. Sampled: exact where both propose given tokens
    (naive multi-draft verification); other pairs are refused there.
    """

    choose: str

    def side(self, opening: Opening) -> Side:
        """Begin drafting for a batch."""
        self.refuse(opening.decoding, "merged drafts must be given tokens")
        return _MergedSide(self, opening)

    def drafts(self, read: Read, depth: int, generator: torch.Generator) -> Drafts:
        """Give the drafts from every start."""
        self.refuse(read.decoding, "merged drafts must be given tokens")
        limit = self.depth if self.choose == "confidence" else min(depth, self.depth)
        both = [start_drafts(part, read, limit, generator) for part in self.parts]
        merged = self.merge([rows_of(d) for d in both], [d.confidence for d in both], min(depth, self.depth))
        return packed_drafts(merged)

    def merge(
        self, drafts: Sequence[Sequence[Draft]], confidence: Sequence[NDArray[Any] | None], limit: int
    ) -> list[Draft]:
        """Give one draft a row out of two; `confidence` [rows, nodes] of either part."""
        if self.choose == "both":
            return [draft_trees.fuse(*(draft_trees.cut(d, limit) for d in row)) for row in zip(*drafts, strict=True)]
        means = [_mean(rows, sure, self.name) for rows, sure in zip(drafts, confidence, strict=True)]
        better = (means[1] > means[0]).astype(int).tolist()
        return [draft_trees.cut(drafts[which][row], limit) for row, which in enumerate(better)]


class _MergedSide:
    """Both sides, which draft in every round."""

    def __init__(self, pair: Merged, opening: Opening) -> None:
        self._pair, self._opening = pair, opening
        self._sides = [part.side(opening) for part in pair.parts]

    def draft(self, gamma: int, generator: torch.Generator) -> Proposal:
        """Propose up to `gamma` tokens deep per row."""
        pair, limit = self._pair, min(gamma, self._pair.depth)
        asked = pair.depth if pair.choose == "confidence" else limit
        both = [side.draft(asked, generator) for side in self._sides]
        sure = [None if found.confidence is None else found.confidence.cpu().numpy() for found in both]
        return proposal(pair.merge([rows_of(found) for found in both], sure, limit), self._opening)

    def commit(self, emitted: Sequence[Sequence[int]], states: Mapping[Tap, Sequence[Tensor]]) -> None:
        """Let both take in the emitted tokens."""
        for side in self._sides:
            side.commit(emitted, states)


def start_drafts(part: Drafter, read: Read, depth: int, generator: torch.Generator) -> Drafts:
    """Give what a part drafts from every start, up to `depth` tokens deep.

    `CalibrationError` where the recording lets a model run less far.
    """
    if not isinstance(part, ModelDrafter):
        starts: StartDrafter = part  # type: ignore[assignment]
        return starts.drafts(read, depth, generator)
    chains = read.chains[part.name]
    steps = chains.tokens.shape[1]
    if steps < depth and part.stop is None:
        rule = f"gamma_max must be at least the {depth} tokens that a drafter made of it drafts"
        raise CalibrationError(f"drafter '{part.name}': {rule}, got {steps}")
    return Drafts(
        chains.tokens[:, :depth],
        confidence=_cut(chains.confidence, depth),
        entropy=_cut(chains.entropy, depth),
        accept=_cut(chains.accept, depth),
    )


def rows_of(found: Proposal | Drafts) -> list[Draft]:
    """Give the draft of every row, or of every start."""
    tokens = found.tokens.tolist()
    parents = None if found.parents is None else found.parents.tolist()
    if isinstance(found, Proposal):
        counts: list[int] = found.counts.tolist()
    else:
        counts = (found.tokens >= 0).sum(1).tolist()
    return [
        Draft(tuple(tokens[row][:count]), None if parents is None else tuple(parents[row][:count]))
        for row, count in enumerate(counts)
    ]


def fitted(values: NDArray[Any], width: int) -> NDArray[Any]:
    """Give `values` [T, N] with `width` columns: cut, or filled up with the NaN or 0 of their type."""
    short = max(width - values.shape[1], 0)
    empty = np.nan if values.dtype.kind == "f" else 0
    return np.pad(values, ((0, 0), (0, short)), constant_values=empty)[:, :width]


def _cut(values: NDArray[Any] | None, depth: int) -> NDArray[Any] | None:
    return None if values is None else values[:, :depth]


def _widened(q: Tensor, width: int) -> Tensor:
    """Give `q` [rows, n, vocabulary] with `width` >= n or fewer places, of which only real ones are not 0."""
    return torch.nn.functional.pad(q, (0, 0, 0, max(width - q.shape[1], 0)))[:, :width]


def _mean(drafts: Sequence[Draft], confidence: NDArray[Any] | None, name: str) -> NDArray[np.float64]:
    """Give the mean confidence of each row's nodes; below any where there are none."""
    if confidence is None:
        raise CalibrationError(f"drafter '{name}': choose = 'confidence' needs two drafters that have one")
    rows = [confidence[row, : len(draft.tokens)] for row, draft in enumerate(drafts)]
    return np.array([float(np.mean(row, dtype=np.float64)) if len(row) else -1.0 for row in rows])


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
