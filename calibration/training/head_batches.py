"""Training batches of pairs (state, next token), from stored states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration.models.lane import Lane, pad_left
from calibration.trained.corpus import Text


@dataclass(frozen=True)
class PairBatch:
    """Texts side by side, flush left: pair i of a row is (f_i, x_{i+1}).

    ``features`` [rows, M, hidden size], ``tokens`` and ``real`` [rows, M]. ``first`` [rows]: the pair from which the
    first output token with a stored state behind it is drafted. Draft j from pair a stands for token a + 1 + j, which
    the verifier predicted by f_{a+j}.
    """

    features: Tensor
    tokens: Tensor
    real: Tensor
    first: Tensor

    def starts(self) -> Tensor:
        """Say from which pairs at least one draft can be compared [rows, M]."""
        column = torch.arange(self.real.shape[1], device=self.real.device)
        return (column >= self.first[:, None]) & (column + 1 < self.real.sum(1)[:, None])

    def targets(self, last: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Give, for draft `step` (from 0) from the pairs `last` [rows, S]: state, token, and where they are known.

        The state [rows, S, hidden size] is the verifier's that predicted the token [rows, S].
        """
        at = last + step + 1
        known = at < self.real.sum(1)[:, None]
        at = torch.where(known, at, 0)
        state = self.features.gather(1, at[..., None].expand(-1, -1, self.features.shape[-1]))
        return state, self.tokens.gather(1, at), known


class PairReader:
    """Lays texts side by side; with `prompts`, the verifier reads each prompt once, for its states."""

    def __init__(self, verifier: Any, *, prompts: bool) -> None:
        self._verifier, self._prompts = verifier, prompts
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def batch(self, texts: Sequence[Text], dtype: torch.dtype) -> PairBatch:
        """Give the pairs of `texts` in `dtype`."""
        device = self._verifier.device
        before = self._prompt_states([text.prompt_ids for text in texts])
        counts = [len(prompt) + len(text.states) for prompt, text in zip(before, texts, strict=True)]
        features = torch.zeros(len(texts), max(counts), before[0].shape[1], dtype=torch.float16)
        tokens = torch.zeros(len(texts), max(counts), dtype=torch.long)
        real = torch.zeros(len(texts), max(counts), dtype=torch.bool)
        for row, (prompt, text, count) in enumerate(zip(before, texts, counts, strict=True)):
            features[row, : len(prompt)] = prompt
            features[row, len(prompt) : count] = torch.from_numpy(np.array(text.states))
            tokens[row, :count] = torch.as_tensor((*text.prompt_ids, *text.output_ids)[-count:])
            real[row, :count] = True
        first = torch.tensor([max(0, len(prompt) - 1) for prompt in before])
        return PairBatch(features.to(device, dtype), tokens.to(device), real.to(device), first.to(device))

    @torch.no_grad()
    def _prompt_states(self, prompts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Give f_0 .. f_{P-2} of each prompt in float16; the state after its last token is the output's first."""
        if not self._prompts:
            size = self._verifier.config.hidden_size
            return [torch.zeros(0, size, dtype=torch.float16)] * len(prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if new:
            lane = Lane(self._verifier, len(new), taps=("norm",))
            tokens, real = pad_left(new, self._verifier.device)
            lane.feed(tokens, real, last=1)
            for prompt, states, mine in zip(new, lane.tapped["norm"], real, strict=True):
                self._kept[prompt] = states[mine][:-1].to("cpu", torch.float16)
        return [self._kept[prompt] for prompt in prompts]
