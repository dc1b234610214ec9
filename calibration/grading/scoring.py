"""Log-likelihoods of the options of items, at several exits of one model by one forward pass (torch).

An item is read once, packed: the prompt, then every option as a branch that sees the prompt and itself alone. Exit L
is the model's final norm and head on the output of its first L layers, as the drafters of `calibration.drafters.cut`;
reading it from the hidden states of the whole model is exact, for no layer sees a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.common.fetch import Advance
from calibration.grading.builtin import Item

PROMPT = (
    "Question: What is 2 + 3?\nAnswer: 5\n\n"
    "Question: What color is blood?\nAnswer: red\n\n"
    "Question: {question}\nAnswer:"
)
"""The text before an option, which follows after one blank: two worked examples, then the item.

The same for every model and item, without a chat template: an option is scored as the continuation of a text, and
the examples show that the answer stands there alone. Small models lose ten points of accuracy without them.
"""


@dataclass(frozen=True)
class Packed:
    """One item as token ids: the prompt, and per option its tokens."""

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens of the packed row: the prompt and every option less its last token, which nothing follows."""
        return len(self.prompt) + sum(len(option) - 1 for option in self.options)


@dataclass(frozen=True)
class Scores:
    """What the stages make of items.

    ``log_likelihood`` [stages, items][options]: sum of the log-probabilities of an option's tokens (natural log).
    ``exact`` bool [stages, items]: every token of the right answer is the likeliest one at its place, so that greedy
    decoding begins with the right answer. ``prompt_tokens`` [items].
    """

    log_likelihood: list[list[NDArray[np.float64]]]
    exact: NDArray[np.bool_]
    prompt_tokens: NDArray[np.int64]


def pack(tokenizer: Any, item: Item) -> Packed:
    """Give the tokens of `item`; options are what follows the prompt's tokens in prompt + blank + option.

    Raises:
        CalibrationError: an option has no token of its own.
    """
    prompt = PROMPT.format(question=item.question)
    ids = tuple(tokenizer(prompt).input_ids)
    # Some tokenizers end a text with a token of their own; the options' rows have it too and it is cut off there.
    end = getattr(tokenizer, "eos_token_id", None)
    ids = ids[:-1] if len(ids) > 1 and ids[-1] == end else ids
    options = []
    for option in item.options:
        whole = tuple(tokenizer(f"{prompt} {option}").input_ids)
        whole = whole[:-1] if whole[-1] == end else whole
        if len(whole) <= len(ids):
            raise CalibrationError(f"item '{item.id}': every option must have a token of its own, got {option!r}")
        options.append(whole[len(ids) :])
    return Packed(ids, tuple(options))


@torch.inference_mode()
def score(
    model: Any,
    packed: Sequence[Packed],
    right: Sequence[int],
    exits: Sequence[int],
    *,
    batch_size: int = 8,
    advance: Advance | None = None,
) -> Scores:
    """Give the `Scores` of `packed` items at the exits (numbers of layers; that of the model is the model itself).

    Items of like length share a batch; the result does not depend on `batch_size` but for rounding.
    """
    order = sorted(range(len(packed)), key=lambda i: packed[i].tokens)
    found: list[list[NDArray[np.float64]]] = [[np.empty(0)] * len(packed) for _ in exits]
    exact = np.zeros((len(exits), len(packed)), dtype=bool)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        for stage, answers in enumerate(read(model, [packed[i] for i in rows], exits)):
            for i, (log_likelihood, greedy) in zip(rows, answers, strict=True):
                found[stage][i] = log_likelihood
                exact[stage, i] = greedy[right[i]]
        if advance is not None:
            advance(len(rows))
    return Scores(found, exact, np.array([len(item.prompt) for item in packed]))


Answers = list[tuple[NDArray[np.float64], NDArray[np.bool_]]]
"""Per item: the log-likelihood of each option, and whether greedy decoding gives its tokens."""


def read(model: Any, rows: Sequence[Packed], exits: Sequence[int]) -> list[Answers]:
    """Run the model on one batch in one forward pass; give the answers of every exit."""
    tokens, positions, allowed = _columns(rows, model.device)
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=model.device)
    mask = mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None]
    states = model.model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    row, column, target = _asked(rows, model.device)
    answers = []
    for layers in exits:
        state = states[layers][row, column]
        # The last hidden state is normed already.
        state = state if layers == model.config.num_hidden_layers else model.model.norm(state)
        logits = model.get_output_embeddings()(state).float()
        told = torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
        answers.append(_sums(rows, told, logits.argmax(-1) == target))
    return answers


def _columns(rows: Sequence[Packed], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Give tokens and positions [rows, width] and who sees whom [rows, width, width]; padding sees itself alone."""
    width = max(row.tokens for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    allowed = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    for r, row in enumerate(rows):
        prompt = len(row.prompt)
        tokens[r, :prompt] = torch.tensor(row.prompt)
        positions[r, :prompt] = torch.arange(prompt)
        allowed[r, :prompt, :prompt] = torch.ones(prompt, prompt, dtype=torch.bool).tril()
        begin = prompt
        for option in row.options:
            size = len(option) - 1
            end = begin + size
            tokens[r, begin:end] = torch.tensor(option[:-1], dtype=torch.long)
            positions[r, begin:end] = prompt + torch.arange(size)
            allowed[r, begin:end, :prompt] = True
            allowed[r, begin:end, begin:end] = torch.ones(size, size, dtype=torch.bool).tril()
            begin = end
    return tokens.to(device), positions.to(device), allowed.to(device)


def _asked(rows: Sequence[Packed], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Give row, column and target of every prediction: the prompt's end predicts the first token of every option."""
    asked: list[tuple[int, int, int]] = []
    for r, row in enumerate(rows):
        begin = len(row.prompt)
        for option in row.options:
            columns = [len(row.prompt) - 1, *range(begin, begin + len(option) - 1)]
            asked += [(r, column, target) for column, target in zip(columns, option, strict=True)]
            begin += len(option) - 1
    row_, column_, target_ = torch.tensor(asked, device=device).unbind(1)
    return row_, column_, target_


def _sums(rows: Sequence[Packed], told: Tensor, likeliest: Tensor) -> Answers:
    """Sum log-probabilities over each option's tokens."""
    values = told.double().cpu().numpy()
    hits = likeliest.cpu().numpy()
    answers: Answers = []
    at = 0
    for row in rows:
        sums, greedy = [], []
        for option in row.options:
            sums.append(values[at : at + len(option)].sum())
            greedy.append(hits[at : at + len(option)].all())
            at += len(option)
        answers.append((np.array(sums), np.array(greedy)))
    return answers
