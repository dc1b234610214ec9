"""How well a student drafts on held-out text, from the verifier's stored states: no pass of the verifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.models.load import Verifier
from calibration.models.sampling import processed
from calibration.traces.manifest import DecodingInfo
from calibration.trained.corpus import Batch, Text, collate

GAMMA = 4
"""Draft length of `Quality.tokens_per_round`."""

ROWS, POSITIONS = 8, 256
"""Texts read at once, and positions whose distributions are held at once."""


@dataclass(frozen=True)
class Quality:
    """A student on held-out text of `held_out_tokens` output tokens.

    ``match``: share of positions where its largest logit is the verifier's. ``overlap``: mean of sum min(p, q).
    ``tokens_per_round``: tokens emitted per round of drafts of 4, the verifier's own token included; the expectation
    over the acceptance given the text, exact for the decoding by which the text was written. Rounded to 5 decimals.
    """

    match: float
    overlap: float
    tokens_per_round: float
    held_out_tokens: int

    def row(self) -> dict[str, Any]:
        """Give the numbers by name."""
        return asdict(self)


@torch.inference_mode()
def evaluate(student: Any, verifier: Verifier, texts: Sequence[Text], decoding: DecodingInfo) -> Quality:
    """Measure `student` on `texts`, which `verifier` wrote by `decoding`; the whole vocabulary counts."""
    matches, overlaps, rounds = [], [], 0.0
    ordered = sorted(texts, key=lambda text: len(text.prompt_ids) + len(text.output_ids))
    for begin in range(0, len(ordered), ROWS):
        rows = ordered[begin : begin + ROWS]
        batch = collate(rows, verifier.device)
        match, overlap, accept = positions(student, verifier, batch, decoding)
        matches.append(match)
        overlaps.append(overlap)
        bounds = np.cumsum([len(text.output_ids) for text in rows])[:-1]
        rounds += sum(rounds_by_position(part, GAMMA) for part in np.split(accept, bounds))
    match, overlap = np.concatenate(matches), np.concatenate(overlaps)
    emitted = len(match) - len(texts)  # the first token of each text comes from the prefill
    length = emitted / rounds if rounds else 0.0
    return Quality(round(float(match.mean()), 5), round(float(overlap.mean()), 5), round(length, 5), len(match))


def by_domain(
    student: Any, verifier: Verifier, texts: Mapping[str, Sequence[Text]], decoding: DecodingInfo
) -> dict[str, Quality]:
    """Measure `student` on the texts of every domain."""
    return {domain: evaluate(student, verifier, mine, decoding) for domain, mine in texts.items()}


def expected_rounds(accept: NDArray[np.float64]) -> float:
    """Give the expected number of rounds that commit a text of T tokens from its first one on.

    ``accept`` [T, K]: from start t, the probability that draft j is accepted, given that the ones before it were;
    NaN behind the end. A round at t with j accepted drafts leads to t + j + 1.
    """
    count, depth = accept.shape
    begins = np.zeros(count + depth + 1)
    begins[0] = 1.0
    for t in range(count):
        alive = begins[t]
        for j in range(depth):
            a = accept[t, j] if t + j < count else 1.0
            begins[t + j + 1] += alive * (1 - a)
            alive *= a
        begins[t + depth + 1] += alive
    return float(begins[:count].sum())


def rounds_by_position(accept: NDArray[np.float64], gamma: int) -> float:
    """Give the expected number of rounds of `gamma` drafts that commit x_1 .. x_{T-1}; the first begins at 1.

    ``accept`` [T]: the probability that the draft of x_t is accepted, independently given the text.
    """
    padded = np.concatenate([accept[1:], np.full(gamma, np.nan)])
    return expected_rounds(np.lib.stride_tricks.sliding_window_view(padded, gamma)[: len(accept) - 1])


@torch.inference_mode()
def positions(
    student: Any, verifier: Verifier, batch: Batch, decoding: DecodingInfo
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Give (match, overlap, acceptance probability) at every output position of a batch, one text after the other."""
    head = verifier.model.get_output_embeddings()
    # A student in training keeps float32 weights beside a verifier in half precision.
    mixed = student.model.norm.weight.dtype != head.weight.dtype
    with torch.autocast(verifier.device.type, dtype=torch.bfloat16, enabled=mixed):
        hidden = final_states(student, batch)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for begin in range(0, len(hidden), POSITIONS):
        mine = slice(begin, begin + POSITIONS)
        p_logits = head(batch.states[mine].to(head.weight.dtype))
        q_logits = head(hidden[mine].to(head.weight.dtype))
        p, q = processed(p_logits, decoding), processed(q_logits, decoding)
        match = (p_logits.argmax(-1) == q_logits.argmax(-1)).double()
        at = batch.targets[mine, None]
        ratio = (q.gather(-1, at) / p.gather(-1, at).clamp(min=1e-30))[:, 0].clamp(max=1.0)
        accept = match if decoding.mode == "greedy" else ratio.double()
        parts.append((match, torch.minimum(p, q).sum(-1).double(), accept))
    match, overlap, accept = (torch.cat(values).cpu().numpy() for values in zip(*parts, strict=True))
    return match, overlap, accept


def final_states(student: Any, batch: Batch) -> Tensor:
    """Give the student's final states [n, hidden size] at the positions of `batch`; they keep their gradient."""
    return body_states(student, batch).flatten(0, 1)[batch.places]


def body_states(student: Any, batch: Batch) -> Tensor:
    """Give the student's final states [rows, longest, hidden size] over `batch`."""
    norm: Tensor = student.model.norm.weight
    embedded = student.get_input_embeddings()(batch.tokens).to(norm.dtype)
    states: Tensor = student.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return states
