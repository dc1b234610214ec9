"""Distributions over the next token: temperature and top-p, drawing, and the numbers read off them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calibration.traces.manifest import DecodingInfo

HEAD = 1024
"""How many of the largest probabilities are sorted first; rows whose nucleus is wider are sorted whole."""


def distribution(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Give probabilities float32 [..., vocabulary]: softmax of logits / temperature, cut to its top-p nucleus.

    The nucleus is the smallest set of most probable tokens whose mass reaches `top_p` (Holtzman et al. 2020), with
    every token as probable as its last one; the rest gets probability 0 and what is left is normalised.
    """
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p >= 1.0:
        return probs
    # NOTE: sorting 49,152 values takes ten times as long as finding the first 1,024, which nearly always hold the
    # nucleus (160 rows on one core: 0.65 s against 0.07 s). Only the other rows are sorted whole.
    rows = probs.reshape(-1, probs.shape[-1])
    head = rows.topk(min(HEAD, rows.shape[-1])).values
    smallest = _smallest_kept(head, top_p)
    wide = head.sum(-1) < top_p
    if bool(wide.any()):
        smallest[wide] = _smallest_kept(torch.sort(rows[wide], dim=-1, descending=True).values, top_p)
    rows = rows.masked_fill(rows < smallest, 0.0)
    return (rows / rows.sum(-1, keepdim=True)).reshape(probs.shape)


def _smallest_kept(ordered: Tensor, top_p: float) -> Tensor:
    """Give the smallest probability in the nucleus [rows, 1]; `ordered` [rows, n] falls along a row."""
    before = ordered.cumsum(-1) - ordered
    return ordered.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)


def processed(logits: Tensor, decoding: DecodingInfo) -> Tensor:
    """Give the distributions that a trace describes.

    Sampled decoding: after temperature and top-p, as tokens are drawn from them. Greedy decoding: the plain softmax,
    for diagnosis alone, since greedy acceptance reads only the largest logit.
    """
    if decoding.mode == "greedy":
        return distribution(logits)
    return distribution(logits, decoding.temperature, decoding.top_p)


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token id per distribution: [..., vocabulary] -> int64 [...]."""
    flat = probs.reshape(-1, probs.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).reshape(probs.shape[:-1])


def choose(logits: Tensor, decoding: DecodingInfo, generator: torch.Generator) -> Tensor:
    """Give the next token of each row [...]: the largest logit in greedy decoding, else a draw."""
    if decoding.mode == "greedy":
        return logits.argmax(-1)
    return draw(processed(logits, decoding), generator)


def entropy(probs: Tensor) -> Tensor:
    """Give the entropy in nats of each distribution [..., vocabulary] -> [...]."""
    nats: Tensor = torch.special.entr(probs).sum(-1)
    return nats


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Give norm([p - q]+), from which a rejected draft is replaced (Leviathan et al. 2023, Chen et al. 2023).

    Where p = q nothing can be rejected but by rounding; p itself is given there.
    """
    rest = (p - q).clamp(min=0.0)
    mass = rest.sum(-1, keepdim=True)
    return torch.where(mass > 0, rest / mass.clamp(min=torch.finfo(rest.dtype).tiny), p)


def generator_for(device: torch.device, *seed: int) -> torch.Generator:
    """Give a torch Generator on `device`, seeded from the integers `seed` (a run's seed, a shard's number ...)."""
    state = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(state)


def numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """Give a numpy Generator whose seed is the next number of `generator`."""
    seed = torch.randint(0, 2**62, (1,), generator=generator, device=generator.device)
    return np.random.default_rng(int(seed))
