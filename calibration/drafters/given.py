"""Drafters that propose given tokens: any proposer of `calibration.proposers`, over a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.drafters.lanes import host_seconds
from calibration.models.drafter import Drafter, Drafts, Opening, Proposal, Read, Side, Tap
from calibration.proposers.protocol import Draft, Proposer
from calibration.traces.manifest import DecodingInfo, DrafterInfo


@dataclass(frozen=True)
class GivenDrafter:
    """A drafter whose drafts are given by the committed tokens; ``make`` begins one proposer per request."""

    info: DrafterInfo
    make: Callable[[], Proposer]
    parts: tuple[Drafter, ...] = ()
    model: None = None
    taps: tuple[Tap, ...] = ()

    @property
    def name(self) -> str:
        """Name in the manifest."""
        return self.info.name

    def side(self, opening: Opening) -> Side:
        """Begin drafting for a batch."""
        return GivenSide(self.make, opening)

    def drafts(self, read: Read, depth: int, generator: torch.Generator) -> Drafts:
        """Give the drafts from every start: the proposer is asked once at each."""
        proposer = self.make()
        proposer.extend(read.prompt_ids)
        found = []
        for token in read.output_ids:
            found.append(proposer.propose(depth))
            proposer.extend([token])
        return packed_drafts(found)

    def step(self, batch: int, context_tokens: int, noise: torch.Generator) -> Callable[[], float]:
        """Give a function that lets every row take in one token and propose, once."""
        texts = torch.randint(0, 1000, (batch, context_tokens), generator=noise).tolist()

        def run() -> float:
            rows = [self.make() for _ in texts]
            for row, text in zip(rows, texts, strict=True):
                row.extend(text)

            def action() -> None:
                for row, text in zip(rows, texts, strict=True):
                    row.extend(text[:1])
                    row.propose(self.info.max_draft_tokens or 20)

            return host_seconds(action)

        return run


class GivenSide:
    """One proposer per row."""

    def __init__(self, make: Callable[[], Proposer], opening: Opening) -> None:
        self._rows = [make() for _ in opening.prompts]
        for proposer, prompt, token in zip(self._rows, opening.prompts, opening.first, strict=True):
            proposer.extend([*prompt, token])
        self._opening = opening

    def draft(self, gamma: int, generator: torch.Generator) -> Proposal:
        """Propose up to `gamma` tokens deep per row; nothing where nothing is known."""
        return proposal([row.propose(gamma) for row in self._rows], self._opening)

    def commit(self, emitted: Sequence[Sequence[int]], states: Mapping[Tap, Sequence[Tensor]]) -> None:
        """Take in the emitted tokens."""
        for row, tokens in zip(self._rows, emitted, strict=True):
            row.extend(tokens)


def proposal(drafts: Sequence[Draft], opening: Opening) -> Proposal:
    """Pack drafts of given tokens, one a row, for the verifier: chains where all are, else trees."""
    width = max(len(draft.tokens) for draft in drafts)
    tokens = torch.zeros(len(drafts), width, dtype=torch.long)
    parents = torch.full((len(drafts), width), -1, dtype=torch.long)
    for row, draft in enumerate(drafts):
        count = len(draft.tokens)
        tokens[row, :count] = torch.as_tensor(draft.tokens, dtype=torch.long)
        up = range(-1, count - 1) if draft.parents is None else draft.parents
        parents[row, :count] = torch.as_tensor(list(up), dtype=torch.long)
    counts = torch.tensor([len(draft.tokens) for draft in drafts])
    place = opening.device
    if any(draft.parents is not None for draft in drafts):
        return Proposal(tokens.to(place), counts.to(place), None, parents=parents.to(place))
    q = one_hot(tokens, counts, opening.verifier.config.vocab_size, opening.decoding)
    return Proposal(tokens.to(place), counts.to(place), None if q is None else q.to(place))


def one_hot(tokens: Tensor, counts: Tensor, vocabulary: int, decoding: DecodingInfo) -> Tensor | None:
    """Give the q of given tokens [rows, n, vocabulary], which is all theirs; None in greedy decoding."""
    if decoding.mode == "greedy":
        return None
    real = torch.arange(tokens.shape[1]) < counts[:, None]
    return torch.nn.functional.one_hot(tokens, vocabulary).float() * real[..., None]


def packed_drafts(found: Sequence[Draft]) -> Drafts:
    """Pack the drafts from every start into arrays."""
    width = max((len(draft.tokens) for draft in found), default=0)
    tree = any(draft.parents is not None for draft in found)
    tokens: NDArray[np.int32] = np.full((len(found), width), -1, dtype=np.int32)
    parents = np.full((len(found), width), -1, dtype=np.int32)
    for row, draft in enumerate(found):
        count = len(draft.tokens)
        tokens[row, :count] = draft.tokens
        parents[row, :count] = range(-1, count - 1) if draft.parents is None else draft.parents
    return Drafts(tokens, parents if tree else None)
