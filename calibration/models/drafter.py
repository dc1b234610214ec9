"""What a drafter is: it drafts in a live loop (`Side`), and says what it would draft from every start (`Drafts`).

Two families:

*Lane drafters* are causal LMs that see tokens alone (`calibration.drafters.lanes.ModelDrafter`). One teacher-forced
pass records all their starts at once, because as long as a draft agrees with the text its context is a prefix of the
text.

*Start drafters* are asked from every start (everything else: heads that draft from the verifier's states, proposers,
combinations, drafters in another vocabulary). What they propose is a function of the committed text alone, never of
where earlier rounds began; recorded run lengths therefore replay every schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.models.sampling import processed
from calibration.traces.manifest import DecodingInfo, DrafterInfo

Tap = str | int
"""A state of the verifier: ``"norm"``, which its head reads, or the output of a decoder layer (from 0)."""

States = Mapping[Tap, Tensor]


@dataclass(frozen=True)
class Proposal:
    """Drafts of one round: `tokens` [rows, n], of which the first `counts` [rows] of each row are real.

    A chain where ``parents`` is None. Else a tree per row: node i hangs on node ``parents[row, i]`` < i, or on the
    last committed token (-1); nodes are ordered by depth. ``q``: the distributions that a chain was drawn from
    [rows, n, vocabulary], 0 where nothing is drafted; None in greedy decoding, and for trees, whose tokens are given.
    ``confidence`` [rows, n]: the drafter's largest probability at each draft, where it has one.
    """

    tokens: Tensor
    counts: Tensor
    q: Tensor | None
    parents: Tensor | None = None
    confidence: Tensor | None = None


@dataclass(frozen=True)
class Opening:
    """What a drafting side begins with: the `verifier` model, the prompts, and the first token of each row.

    ``states``: per tap, for each row the verifier's states [prompt tokens, hidden size] after every prompt token.
    """

    verifier: Any
    prompts: Sequence[Sequence[int]]
    first: Sequence[int]
    decoding: DecodingInfo
    states: Mapping[Tap, Sequence[Tensor]]

    @property
    def device(self) -> torch.device:
        """Device of the verifier."""
        device: torch.device = self.verifier.device
        return device


class Side(Protocol):
    """The drafting side of a live loop, over a batch of rows."""

    def draft(self, gamma: int, generator: torch.Generator) -> Proposal:
        """Propose up to `gamma` tokens (trees: `gamma` deep) per row."""
        ...

    def commit(self, emitted: Sequence[Sequence[int]], states: Mapping[Tap, Sequence[Tensor]]) -> None:
        """Take in what each row emitted this round, the token after the accepted drafts last.

        ``states``: per tap and row, the verifier's states after the token before the emitted ones and after all of
        them but the last [emitted tokens, hidden size]: each is the state that predicted the emitted token.
        """
        ...


@dataclass(frozen=True)
class Read:
    """One request as the recording pass saw it.

    ``states`` per tap: the verifier's state after each token of prompt + output but the last
    [P + T - 1, hidden size]. ``chains``: what the lane drafters among the drafter's parts draft from every start, by
    name.
    """

    verifier: Any
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    decoding: DecodingInfo
    states: States
    chains: Mapping[str, Drafts]

    @functools.cached_property
    def verifier_p(self) -> Tensor:
        """p at every output position [T, vocabulary], processed."""
        states = self.states["norm"][len(self.prompt_ids) - 1 :]
        return processed(self.verifier.get_output_embeddings()(states).to(states.device), self.decoding)

    def mass(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Give p of one token per position [T]; 0 where it is -1."""
        index = torch.as_tensor(tokens, dtype=torch.long, device=self.verifier_p.device)
        picked = self.verifier_p.gather(1, index.clamp(min=0)[:, None])[:, 0]
        values: NDArray[np.float32] = torch.where(index >= 0, picked, 0.0).float().cpu().numpy()
        return values


@dataclass(frozen=True)
class Drafts:
    """What a drafter proposes from every start t of one output: T rows of up to N nodes, -1 behind the last.

    ``parents`` None: chains; else as in `Proposal`. ``confidence``, ``entropy`` [T, N]: the drafter's, NaN behind the
    last. ``layers`` [T, N]: decoder layers run for each draft, where that varies. ``accept`` [T, N]: sampled chains
    with a q of their own: min(1, q/p) of x_{t+j} at draft j (from 0), given that the drafts before it are the text;
    NaN where the text has ended. ``runs`` [T]: how many drafts are accepted, where the drafts were drawn together
    with that (see `calibration.drafters.exits`). ``rank``, ``overlap`` [T]: rank of x_t and sum of min(p, q) at the
    first draft.
    """

    tokens: NDArray[np.int32]
    parents: NDArray[np.int32] | None = None
    confidence: NDArray[np.float32] | None = None
    entropy: NDArray[np.float32] | None = None
    layers: NDArray[np.int32] | None = None
    accept: NDArray[np.float32] | None = None
    runs: NDArray[np.int64] | None = None
    rank: NDArray[np.int32] | None = None
    overlap: NDArray[np.float32] | None = None

    def at(self, starts: NDArray[np.int64]) -> Drafts:
        """Give the rows of `starts`."""
        taken = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: value[starts] for name, value in taken.items() if value is not None})


class Drafter(Protocol):
    """A drafter ready to run; `model` is its causal LM, None where it has none that could be timed as one."""

    @property
    def info(self) -> DrafterInfo:
        """The drafter in the manifest."""
        ...

    @property
    def name(self) -> str:
        """Name in the manifest."""
        ...

    @property
    def model(self) -> Any | None:
        """Its causal LM, if it is one."""
        ...

    @property
    def taps(self) -> tuple[Tap, ...]:
        """States of the verifier that it reads."""
        ...

    def side(self, opening: Opening) -> Side:
        """Begin drafting for a batch."""
        ...

    def step(self, batch: int, context_tokens: int, noise: torch.Generator) -> Callable[[], float]:
        """Give a function that runs one step of drafting over a batch once, and gives its seconds (host clock)."""
        ...


class StartDrafter(Drafter, Protocol):
    """A drafter that says what it would draft from every start."""

    @property
    def parts(self) -> tuple[Drafter, ...]:
        """Drafters it is made of, whose own reading it needs."""
        ...

    def drafts(self, read: Read, depth: int, generator: torch.Generator) -> Drafts:
        """Give the drafts from every start, up to `depth` tokens deep (less where the drafter itself stops)."""
        ...


def followed(drafts: Drafts, output_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count, for every start, how many tokens deep the text follows the draft [T]."""
    count, width = drafts.tokens.shape
    text = np.concatenate([output_ids, np.full(width + 1, -2)])
    rows = np.arange(count)
    at, deep = np.full(count, -1), np.zeros(count, dtype=np.int64)
    for node in range(width):
        up = node - 1 if drafts.parents is None else drafts.parents[:, node]
        hit = (up == at) & (drafts.tokens[:, node] == text[rows + deep])
        at = np.where(hit, node, at)
        deep += hit
    return deep
