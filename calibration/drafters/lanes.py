"""Lane drafters: causal LMs that see tokens alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibration.models.drafter import Opening, Proposal, Side, Tap
from calibration.models.lane import Lane, Window, pad_left
from calibration.models.sampling import draw, processed
from calibration.traces.manifest import DecodingInfo, DrafterInfo


@dataclass(frozen=True)
class Stop:
    """A drafter's own stopping rule: a token less sure than `confidence` is not drafted, nor more than `tokens`.

    ``confidence`` is the drafter's largest probability. Kangaroo's double early exit is such a rule.
    """

    confidence: float
    tokens: int


@dataclass(frozen=True)
class ModelDrafter:
    """A causal LM with a KV cache of its own; its vocabulary is the verifier's.

    ``window`` limits what it attends to. ``stop`` is its own stopping rule, None where the policy alone decides.
    """

    info: DrafterInfo
    model: Any
    window: Window | None = None
    stop: Stop | None = None

    @property
    def name(self) -> str:
        """Name in the manifest."""
        return self.info.name

    @property
    def taps(self) -> tuple[Tap, ...]:
        """It reads no states of the verifier."""
        return ()

    def side(self, opening: Opening) -> Side:
        """Begin drafting for a batch."""
        return ModelSide(self, opening.prompts, opening.first, opening.decoding)

    def step(self, batch: int, context_tokens: int, noise: torch.Generator) -> Callable[[], float]:
        """Give a function that runs one draft step of one token once."""
        from calibration.drafters.timing import forward_step

        held = context_tokens if self.window is None else self.window.held(context_tokens)
        return forward_step(self.model, batch, 1, held)


class ModelSide:
    """A lane per batch, and the committed tokens that its cache has not seen yet."""

    def __init__(
        self, drafter: ModelDrafter, prompts: Sequence[Sequence[int]], first: Sequence[int], decoding: DecodingInfo
    ) -> None:
        self._stop, self._decoding = drafter.stop, decoding
        self._lane = Lane(drafter.model, len(prompts), window=drafter.window, prompts=prompts)
        self._lane.feed(*pad_left(prompts, self._lane.device), last=1)
        self._pending: list[list[int]] = [[token] for token in first]
        self._fed: list[list[int]] = [[] for _ in prompts]

    def draft(self, gamma: int, generator: torch.Generator) -> Proposal:
        """Draft up to `gamma` tokens per row, one pass each, in lock step; the last draft itself is not fed."""
        return self._draft_from(self._catch_up(), gamma, generator)

    def _catch_up(self) -> Tensor:
        """Read the committed tokens that the cache lacks; give the logits of the first draft [rows, vocabulary]."""
        logits = self._lane.feed(*pad_left(self._pending, self._lane.device), last=1)[:, -1]
        self._pending = [[] for _ in self._pending]
        return logits

    def _draft_from(self, logits: Tensor, gamma: int, generator: torch.Generator) -> Proposal:
        limit = gamma if self._stop is None else min(gamma, self._stop.tokens)
        going = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        drafts: list[Tensor] = []
        real, dists, sure = [], [], []
        for step in range(limit):
            q = processed(logits, self._decoding)
            sure.append(q.amax(-1))
            if self._stop is not None:
                going = going & (sure[-1] >= self._stop.confidence)
            if step and not bool(going.any()):
                break
            greedy = self._decoding.mode == "greedy"
            drafts.append(logits.argmax(-1) if greedy else draw(q, generator))
            real.append(going)
            dists.append(q * going[:, None])
            if step + 1 < limit:
                logits = self._lane.feed(drafts[-1][:, None])[:, -1]
        tokens = torch.stack(drafts, 1)
        fed = tokens if len(drafts) < limit else tokens[:, :-1]
        self._fed = fed.tolist()
        return Proposal(
            tokens,
            torch.stack(real, 1).sum(1),
            torch.stack(dists, 1) if self._decoding.mode == "sampled" else None,
            confidence=torch.stack(sure[: len(drafts)], 1),
        )

    def commit(self, emitted: Sequence[Sequence[int]], states: Mapping[Tap, Sequence[Tensor]]) -> None:
        """Keep the drafts that were emitted in the cache; the other emitted tokens wait for the next pass."""
        kept = [agreed(fed, row) for fed, row in zip(self._fed, emitted, strict=True)]
        width = len(self._fed[0])
        if width:
            column = torch.arange(width, device=self._lane.device)
            self._lane.forget(column >= torch.tensor(kept, device=self._lane.device)[:, None])
        for pending, row, count in zip(self._pending, emitted, kept, strict=True):
            pending.extend(row[count:])
        self._fed = [[] for _ in self._fed]


def agreed(fed: Sequence[int], emitted: Sequence[int]) -> int:
    """Count the tokens on which a draft agrees with what was emitted, which goes on at least one token further."""
    count = 0
    while count < min(len(fed), len(emitted) - 1) and fed[count] == emitted[count]:
        count += 1
    return count


def host_seconds(action: Callable[[], Any]) -> float:
    """Give the seconds that `action` takes by the host's clock."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
