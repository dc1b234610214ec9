"""How well a head drafts on held-out text, by depth, from the stored states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.models.sampling import processed
from calibration.traces.manifest import DecodingInfo
from calibration.trained.corpus import Text
from calibration.trained.evaluate import expected_rounds
from calibration.trained.head_networks import Head
from calibration.training.head_batches import PairBatch, PairReader


@dataclass(frozen=True)
class HeadQuality:
    """A head on held-out text of `tokens` output tokens, going on from the text's own tokens.

    ``match`` [depth]: share of the starts at which the draft of that depth has the verifier's largest logit.
    ``tokens_per_round``: tokens emitted per round of as many drafts as the head is trained for, the verifier's own
    token included; the expectation over the acceptance given the text, exact for the decoding by which the text was
    written.
    """

    match: tuple[float, ...]
    tokens_per_round: float
    tokens: int

    def row(self) -> dict[str, float]:
        """Give the numbers by name, rounded to 5 decimals."""
        by_depth = {f"match_{depth}": round(value, 5) for depth, value in enumerate(self.match, 1)}
        return {**by_depth, "tokens_per_round": round(self.tokens_per_round, 5), "held_out_tokens": self.tokens}


@torch.inference_mode()
def evaluate_head(
    head: Head, verifier: Any, reader: PairReader, texts: Sequence[Text], decoding: DecodingInfo, dtype: torch.dtype
) -> HeadQuality:
    """Measure `head` on `texts`, which the model `verifier` wrote by `decoding`; the whole vocabulary counts."""
    matches, rounds, emitted = [], 0.0, 0
    for text in texts:
        if len(text.output_ids) < 2:
            continue
        match, accept = _measured(head, verifier, reader.batch([text], dtype), decoding)
        matches.append(match)
        rounds += expected_rounds(accept)
        emitted += len(accept)
    by_depth = np.nanmean(np.concatenate(matches), axis=0)
    per_round = emitted / rounds if rounds else 0.0
    return HeadQuality(tuple(by_depth.tolist()), per_round, sum(len(text.output_ids) for text in texts))


def _measured(
    head: Head, verifier: Any, batch: PairBatch, decoding: DecodingInfo
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give match and acceptance probability [T, depth] from every start of one text; NaN behind its end."""
    logits, embed = verifier.get_output_embeddings(), verifier.get_input_embeddings()
    last = batch.starts().nonzero()[:, 1]
    count, place = len(last), last[0] + 1
    token = batch.tokens[0, place:]
    p_logits = logits(batch.features[0, place:].to(logits.weight.dtype))
    own, p = p_logits.argmax(-1), _mass(p_logits, token, decoding)
    match, accept = (np.full((count, head.shape.tokens), np.nan) for _ in range(2))

    def follow(step: int, features: Tensor) -> Tensor:
        left = count - step  # drafts of this depth whose token lies in the text
        if left > 0:
            q_logits = logits(features[0, :left].to(logits.weight.dtype))
            same = (q_logits.argmax(-1) == own[step:]).double()
            ratio = _mass(q_logits, token[step:], decoding) / p[step:].clamp(min=1e-30)
            match[:left, step] = same.cpu().numpy()
            accept[:left, step] = (same if decoding.mode == "greedy" else ratio.clamp(max=1.0)).cpu().numpy()
        embedded: Tensor = embed(token[(torch.arange(count, device=token.device) + step).clamp(max=count - 1)])
        return embedded[None].to(features.dtype)

    past = head.read(None, batch.features, embed(batch.tokens).to(batch.features.dtype), batch.real)
    head.unroll(past, past.branches(last[None]), head.shape.tokens, follow)
    return match, accept


def _mass(logits: Tensor, token: Tensor, decoding: DecodingInfo) -> Tensor:
    """Give the probability of `token` [n] in the processed distributions."""
    return processed(logits, decoding).gather(-1, token[:, None])[:, 0]
