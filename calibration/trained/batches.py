"""Training batches: texts of nearly equal length side by side, in a seeded order that any step can be found in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibration.trained.corpus import Text

POOL = 16
"""How many batches' worth of texts are sorted by length together."""


@dataclass(frozen=True)
class Batch:
    """Texts side by side.

    ``tokens`` [rows, longest]: prompt and output but its last token, flush left; what stands behind is never seen,
    since attention is causal. ``places`` [n]: where, counted row by row, the n output tokens are predicted; the
    prompt is context alone. ``targets`` [n] are those output tokens, ``states`` [n, hidden size] the verifier's.
    """

    tokens: Tensor
    places: Tensor
    targets: Tensor
    states: Tensor


def epoch_order(texts: Sequence[Text], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Give one epoch's batches, each a list of indices: every text once, at most `batch_tokens` tokens with padding.

    A text longer than that is a batch by itself.
    """
    rng = np.random.default_rng([seed, epoch])
    lengths = np.array([len(text.prompt_ids) + len(text.output_ids) - 1 for text in texts])
    order = rng.permutation(len(texts))
    pool = max(1, POOL * batch_tokens // int(lengths.mean()))
    batches: list[list[int]] = []
    for begin in range(0, len(order), pool):
        mine = order[begin : begin + pool]
        rows: list[int] = []
        for index in mine[np.argsort(lengths[mine], kind="stable")].tolist():
            if rows and (len(rows) + 1) * lengths[index] > batch_tokens:
                batches.append(rows)
                rows = []
            rows.append(index)
        batches.append(rows)
    return [batches[i] for i in rng.permutation(len(batches)).tolist()]


def steps(texts: Sequence[Text], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Give batches of indices epoch after epoch, without end."""
    epoch = 0
    while True:
        yield from epoch_order(texts, batch_tokens, seed, epoch)
        epoch += 1


def collate(texts: Sequence[Text], device: torch.device) -> Batch:
    """Lay `texts` side by side."""
    rows = [(*text.prompt_ids, *text.output_ids[:-1]) for text in texts]
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    places = []
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        tokens[number, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        begin = number * width + len(text.prompt_ids) - 1
        places.append(torch.arange(begin, begin + len(text.output_ids)))
    targets = torch.tensor([token for text in texts for token in text.output_ids])
    states = torch.from_numpy(np.concatenate([text.states for text in texts]))
    return Batch(tokens.to(device), torch.cat(places).to(device), targets.to(device), states.to(device))


def frequent_tokens(texts: Sequence[Text], count: int, vocabulary: int) -> Tensor:
    """Give the `count` tokens most frequent in the outputs, in rising order; the lowest ids where fewer occur."""
    seen = Counter(token for text in texts for token in text.output_ids)
    ranked = sorted(range(vocabulary), key=lambda token: (-seen[token], token))
    return torch.tensor(sorted(ranked[:count]))
