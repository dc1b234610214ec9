"""A lane: one causal LM and its KV cache over a batch of ragged rows.

Rows of a batch advance by different numbers of tokens, so the cache is never cropped. Every column that was fed stays
in it; ``kept`` says which of them belong to a row's text, the others (padding, rejected drafts) are masked out for
good, and position ids count kept columns only. A horizon of some hundred tokens makes the holes cheap.

The verifier's own text: batched generation, greedy or sampled.

Rollouts: what a drafter feels along its own draft, also beyond the token where the text leaves it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from calibration.common.fetch import Advance
from calibration.models.sampling import choose, entropy, processed
from calibration.traces.manifest import DecodingInfo

PIECE = 1024
"""Columns of which only the last logits are wanted are fed in pieces of this many: a mask is n x all columns."""


@dataclass(frozen=True)
class Window:
    """Attention limits of a drafter for long contexts: the first `sink` tokens and the last `recent` ones.

    A token attends to itself, to the tokens fewer than `recent` places back, and to the first `sink` of its row.
    ``memory`` chooses, from the prompts of all rows, up to ``memory_tokens`` of each that stay in sight as well (bool
    [rows, longest prompt]). With ``whole_prompt`` tokens of a prompt attend to all before them, and the limits hold
    for what follows it alone.
    """

    sink: int
    recent: int
    whole_prompt: bool = False
    memory: Callable[[Sequence[Sequence[int]]], Tensor] | None = None
    memory_tokens: int = 0

    def held(self, context_tokens: int) -> int:
        """Give the tokens whose keys and values a draft step reads, of `context_tokens`."""
        return min(context_tokens, self.sink + self.memory_tokens + self.recent)


class Lane:
    """Feeds columns of tokens to a model and remembers what each row keeps of them.

    ``kept``: bool [rows, columns fed so far]. ``taps`` names the states to look at: ``"norm"`` is the final norm's
    output, which the head reads, a number the output of that decoder layer (from 0). ``tapped`` holds theirs
    [rows, n, hidden size] for the columns fed last. ``window`` limits what a column attends to; one that depends on
    the ``prompts`` needs them, one per row.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        taps: Sequence[str | int] = (),
        window: Window | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        from transformers import DynamicCache

        self.model = model
        self.taps = tuple(taps)
        self.tapped: dict[str | int, Tensor] = {}
        self.device: torch.device = model.device
        self.cache = DynamicCache()
        self.kept = torch.zeros(rows, 0, dtype=torch.bool, device=self.device)
        self._places = torch.zeros(rows, 0, dtype=torch.long, device=self.device)
        self.limit(window, prompts)

    def limit(self, window: Window | None, prompts: Sequence[Sequence[int]] | None = None) -> None:
        """Let `window` limit what later columns attend to."""
        self.window = window
        self._memory: Tensor | None = None
        self._prompt_tokens: Tensor | None = None
        if window is not None and (window.memory or window.whole_prompt):
            if prompts is None:
                raise ValueError("a window that depends on the prompts needs them")
            self._prompt_tokens = torch.tensor([len(row) for row in prompts], device=self.device)
            if window.memory is not None:
                chosen = window.memory(prompts).to(self.device)
                self._memory = torch.nn.functional.pad(chosen, (0, 1))  # every place behind the prompts is False

    def feed(self, tokens: Tensor, real: Tensor | None = None, *, last: int | None = None) -> Tensor:
        """Feed `tokens` [rows, n]; give logits [rows, n, vocabulary], or those of the `last` columns only.

        ``real`` [rows, n] marks padding with False. Column i attends to every kept column before it and to itself.
        """
        rows, width = tokens.shape
        if real is None:
            real = torch.ones(rows, width, dtype=torch.bool, device=self.device)
        head = 0 if last is None else max(width - last, 0) // PIECE * PIECE
        seen = []
        for begin in range(0, head, PIECE):
            self._columns(tokens[:, begin : begin + PIECE], real[:, begin : begin + PIECE], last=1)
            seen.append(self.tapped)
            self.tapped = {}
        logits = self._columns(tokens[:, head:], real[:, head:], last=last)
        if seen:
            self.tapped = {tap: torch.cat([part[tap] for part in (*seen, self.tapped)], 1) for tap in self.taps}
        return logits

    def _columns(self, tokens: Tensor, real: Tensor, *, last: int | None) -> Tensor:
        """Feed columns at once."""
        width = tokens.shape[1]
        before = self.kept.sum(1, keepdim=True)
        position = (before + real.cumsum(1) - 1).clamp(min=0)
        earlier = self.kept.shape[1]
        self.kept = torch.cat([self.kept, real], dim=1)
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        causal = torch.cat([causal.new_ones(width, earlier), causal], dim=1)
        return self.forward(tokens, position, causal & self.kept[:, None, :], last=last)

    def feed_tree(self, tokens: Tensor, real: Tensor, parents: Tensor) -> Tensor:
        """Feed the last committed token and a tree behind it; give logits [rows, 1 + n, vocabulary].

        `tokens` and `real` [rows, 1 + n], column 0 the committed token; `parents` [rows, n] as in a `Proposal`. A
        node attends to what the row kept, to column 0, to its ancestors and to itself, and stands at its depth.
        """
        rows, width = tokens.shape
        seen = torch.zeros(rows, width, width, dtype=torch.bool, device=self.device)
        seen[:, 0, 0] = True
        index = torch.arange(rows, device=self.device)
        for node in range(1, width):
            seen[:, node] = seen[index, parents[:, node - 1] + 1]
            seen[:, node, node] = True
        position = self.kept.sum(1, keepdim=True) + seen.sum(2) - 1
        before = self.kept[:, None, :].expand(-1, width, -1)
        self.kept = torch.cat([self.kept, real], dim=1)
        return self.forward(tokens, position, torch.cat([before, seen], dim=2))

    def forward(self, tokens: Tensor, position: Tensor, allowed: Tensor, *, last: int | None = None) -> Tensor:
        """Run the model on `tokens` [rows, n] with an explicit mask `allowed` [rows, n, columns]; grows the cache."""
        self._places = torch.cat([self._places, position], 1)
        if self.window is not None:
            allowed = allowed & self._near(self.window, position)
        low = torch.finfo(self.model.dtype).min
        mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=self.device).masked_fill(~allowed, low)
        with self._listening():
            out = self.model(
                input_ids=tokens,
                attention_mask=mask[:, None],
                position_ids=position,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=0 if last is None else last,
            )
        logits: Tensor = out.logits
        return logits

    def _near(self, window: Window, position: Tensor) -> Tensor:
        """Say which columns lie in the window of tokens at `position` [rows, n]: bool [rows, n, columns]."""
        places = self._places[:, None, :]
        near = (position[:, :, None] - places < window.recent) | (places < window.sink)
        if self._memory is not None:
            near |= self._memory.gather(1, self._places.clamp(max=self._memory.shape[1] - 1))[:, None, :]
        if window.whole_prompt and self._prompt_tokens is not None:
            near |= position[:, :, None] < self._prompt_tokens[:, None, None]
        return near

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Keep what the tapped modules give during one pass."""
        body = self.model.model
        places = {tap: body.norm if tap == "norm" else body.layers[int(tap)] for tap in self.taps}
        hooks = [module.register_forward_hook(self._keep(tap)) for tap, module in places.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, tap: str | int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            self.tapped[tap] = state.to(self.device)  # layers may lie on several devices

        return hook

    def forget(self, drop: Tensor) -> None:
        """Mask out the columns where `drop` [rows, n] is True, among the n columns fed last."""
        self.kept[:, -drop.shape[1] :] &= ~drop


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Give (tokens, real) [rows, longest] with the rows flush right."""
    return _pad(rows, device, left=True)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Give (tokens, real) [rows, longest] with the rows flush left."""
    return _pad(rows, device, left=False)


def _pad(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[index, span] = torch.as_tensor(row, dtype=torch.long)
        real[index, span] = True
    return tokens.to(device), real.to(device)


@dataclass(frozen=True)
class Output:
    """What the verifier wrote after one prompt; an end token, if one came, is the last id."""

    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingInfo,
    max_new_tokens: int,
    end_ids: frozenset[int],
    generator: torch.Generator,
    advance: Advance | None = None,
) -> list[Output]:
    """Continue every prompt by up to `max_new_tokens` tokens, one forward pass per token for the whole batch.

    `advance` is called with 1 after every token.
    """
    tokens, real = pad_left(prompts, model.device)
    lane = Lane(model, len(prompts))
    ends = torch.tensor(sorted(end_ids), dtype=torch.long, device=model.device)
    columns: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    with torch.inference_mode():
        logits = lane.feed(tokens, real, last=1)
        while True:
            columns.append(choose(logits[:, -1], decoding, generator))
            if advance:
                advance(1)
            done |= torch.isin(columns[-1], ends)
            if len(columns) == max_new_tokens or bool(done.all()):
                break
            logits = lane.feed(columns[-1][:, None])
    return [cut(row, end_ids) for row in torch.stack(columns, 1).tolist()]


def cut(row: list[int], end_ids: frozenset[int]) -> Output:
    """End a row behind its first end token."""
    for index, token in enumerate(row):
        if token in end_ids:
            return Output(tuple(row[: index + 1]), "stop")
    return Output(tuple(row), "length")


@torch.inference_mode()
def rollout(
    lane: Lane,
    first: Tensor,
    starts: Tensor,
    *,
    origin: int,
    prompt_tokens: Tensor,
    steps: int,
    decoding: DecodingInfo,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Let a drafter run freely from many positions of the same text at once; give (tokens, confidence, entropy).

    Each is [rows, starts, steps - 1] and belongs to steps 2 .. `steps`; step 1 is part of the teacher-forced pass,
    and `first` [rows, starts] are the tokens drafted there. `lane` holds the text's cache with x_i in column
    ``origin`` + i, and is used up.

    All starts are branches packed into one forward pass per step: a branch from t sees the columns of the prompt
    and of x_0 .. x_{t-1}, and of the later ones its own tokens alone. This costs ``steps`` - 1 passes in place of
    starts * (steps - 1), and equals the naive loop but for rounding (a test compares them).
    """
    rows, branches = first.shape
    column = torch.arange(lane.kept.shape[1], device=lane.device)
    visible = lane.kept[:, None, :] & (column < (origin + starts)[:, None])
    own = torch.eye(branches, dtype=torch.bool, device=lane.device).expand(rows, -1, -1)
    token = first
    tokens, confidences, entropies = [], [], []
    for step in range(1, steps):
        visible = torch.cat([visible, own], dim=2)
        logits = lane.forward(token, prompt_tokens[:, None] + starts + (step - 1), visible)
        q = processed(logits, decoding)
        confidences.append(q.amax(-1))
        entropies.append(entropy(q))
        token = choose(logits, decoding, generator)
        tokens.append(token)
    if not confidences:
        empty = torch.zeros(rows, branches, 0, device=lane.device)
        return empty.long(), empty, empty
    return torch.stack(tokens, -1), torch.stack(confidences, -1), torch.stack(entropies, -1)
