"""Public facts about drafter size: acceptance of pairs, and sizes that others found best. Numbers and sources only.

None of these was measured here. ``read`` says how the number was had: *file* (from a public table of measurements),
*quoted* (from a paper or a page, not checked against the original again).

Closed forms of drafting with a constant acceptance rate: tokens of a round, best draft lengths, their inverses.

a: probability that a drafted token is accepted, the same at every depth; k: draft length; c: seconds of a draft step
over those of a plain verifier step. Real acceptance varies with depth and text: see `analysis.speedup.acceptance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibration.common.arrays import Floats


def tokens_per_round(rate: ArrayLike, draft_tokens: ArrayLike) -> Floats:
    """Give 1 + a + ... + a^k, bonus token included (Leviathan et al. 2023, equation 1); k may be fractional.

    (1 - a^(k+1)) / (1 - a); k + 1 where a = 1. Exact for independent drafts of one rate.
    """
    a, k = np.asarray(rate, dtype=np.float64), np.asarray(draft_tokens, dtype=np.float64)
    sure = a >= 1
    below = np.where(sure, 0.5, a)
    return np.asarray(np.where(sure, k + 1.0, -np.expm1((k + 1) * np.log(np.maximum(below, 1e-300))) / (1 - below)))


def rate_of_length(tokens: float, draft_tokens: int) -> float:
    """Give the a whose rounds of draft length k commit `tokens`, bonus included: the inverse of the formula.

    1 <= tokens <= k + 1; raises `ValueError` outside.
    """
    from scipy.optimize import brentq

    if not 1 <= tokens <= draft_tokens + 1:
        raise ValueError(f"tokens per round: must lie in [1, {draft_tokens + 1}], got {tokens}")
    return float(brentq(lambda a: float(tokens_per_round(a, draft_tokens)) - tokens, 0.0, 1.0, xtol=1e-12))


def continuous_best_length(rate: ArrayLike, ratio: ArrayLike) -> Floats:
    """Give the k >= 0 that maximises tokens / (k c + 1), k taken as continuous (SDSL, arXiv 2603.11053).

    With L = -ln a, A = L (1 - c) / c + 1 and z = -W_-1(-e^-A), k = (z - A) / L - 1; W_-1 is Lambert's function.
    0 where drafting never pays (a <= c). Verification is free of the draft's length here.
    """
    from scipy.special import lambertw

    a, c = np.broadcast_arrays(np.asarray(rate, dtype=np.float64), np.asarray(ratio, dtype=np.float64))
    decay = -np.log(np.clip(a, 1e-12, 1 - 1e-12))
    reach = decay * (1 - c) / c + 1
    # W_-1(-e^-A) for large A would underflow: z - ln z = A, whose solution there is A + ln A + ln A / A.
    small = np.minimum(reach, 600.0)
    z = np.where(reach < 600, -lambertw(-np.exp(-small), -1).real, reach + np.log(reach) * (1 + 1 / reach))
    return np.asarray(np.where(a > c, np.maximum((z - reach) / decay - 1, 0.0), 0.0))


def best_lengths(rate: Floats, seconds: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Give (speed-up over no speculation, its draft length) at the best k >= 1.

    `rate` (..., n): acceptance of n drafters. `seconds` (n, K + 1): of a round that drafts k = 0 .. K tokens; k = 0
    is a plain step. The speed-up of k is tokens x seconds[:, 0] / seconds[:, k]; below 1 where speculation does not
    pay.
    """
    best = np.zeros(rate.shape)
    length = np.ones(rate.shape, dtype=np.int64)
    for k in range(1, seconds.shape[1]):
        speed = tokens_per_round(rate, k) * (seconds[:, 0] / seconds[:, k])
        better = speed > best
        best, length = np.where(better, speed, best), np.where(better, k, length)
    return best, length


def break_even_rate(target: float, seconds: Floats) -> float | None:
    """Give the acceptance that a drafter with these round `seconds` (K + 1) needs for a speed-up of `target`.

    None where even an acceptance of 1 does not reach it.
    """
    from scipy.optimize import brentq

    def short(rate: Any) -> float:
        return float(best_lengths(np.array([rate]), seconds[None, :])[0][0]) - target

    if short(1.0) < 0:
        return None
    return 0.0 if short(0.0) >= 0 else float(brentq(short, 0.0, 1.0, xtol=1e-10))


Read = Literal["file", "quoted"]


@dataclass(frozen=True)
class SizedPair:
    """Acceptance of one drafter for one verifier; parameters in all.

    ``acceptance`` is a rate per drafted token: the published alpha, or the constant rate that gives the published
    tokens per round.
    """

    verifier: str
    drafter: str
    verifier_parameters: float
    drafter_parameters: float
    task: str
    acceptance: float
    source: str
    read: Read

    @property
    def share(self) -> float:
        """Parameters of the drafter over those of the verifier."""
        return self.drafter_parameters / self.verifier_parameters

    @property
    def family(self) -> str:
        """Pairs of one family differ in the size of the drafter alone."""
        return f"{self.verifier}, {self.task}"


_LEVIATHAN = "Leviathan, Kalman and Matias 2023 (arXiv 2211.17192), table 3"
_T5 = {"T5-small": 77e6, "T5-base": 250e6, "T5-large": 800e6}
_LAMDA = {"LaMDA 100M": 100e6, "LaMDA 2B": 2e9, "LaMDA 8B": 8e9}


def _family(
    verifier: str, parameters: float, drafters: dict[str, float], task: str, rates: tuple[float, ...]
) -> list[SizedPair]:
    return [
        SizedPair(
            verifier=verifier,
            drafter=name,
            verifier_parameters=parameters,
            drafter_parameters=size,
            task=task,
            acceptance=rate,
            source=_LEVIATHAN,
            read="quoted",
        )
        for (name, size), rate in zip(drafters.items(), rates, strict=True)
    ]


FAMILIES: tuple[SizedPair, ...] = (
    *_family("LaMDA 137B", 137e9, _LAMDA, "dialogue, greedy", (0.61, 0.71, 0.75)),
    *_family("LaMDA 137B", 137e9, _LAMDA, "dialogue, sampled", (0.57, 0.71, 0.74)),
    *_family("T5-XXL 11B", 11e9, _T5, "translation, greedy", (0.75, 0.80, 0.82)),
    *_family("T5-XXL 11B", 11e9, _T5, "translation, sampled", (0.62, 0.68, 0.71)),
    *_family("T5-XXL 11B", 11e9, _T5, "summaries, greedy", (0.65, 0.73, 0.74)),
    *_family("T5-XXL 11B", 11e9, _T5, "summaries, sampled", (0.53, 0.55, 0.56)),
)
"""Pairs at three sizes each: how acceptance grows with size."""

_APERTUS = "Apertus v1.5 70B with its 8B, K = 3, vLLM on 4 x GH200: mean acceptance length, bonus included"

ANCHORS: tuple[SizedPair, ...] = (
    SizedPair(
        verifier="Llama-2-70B",
        drafter="Llama-2-7B",
        verifier_parameters=69e9,
        drafter_parameters=6.74e9,
        task="greedy",
        acceptance=0.8563,
        source="Sequoia repository, 7b_70b log",
        read="file",
    ),
    SizedPair(
        verifier="Apertus-70B",
        drafter="Apertus-8B",
        verifier_parameters=70.6e9,
        drafter_parameters=8.05e9,
        task="code",
        acceptance=rate_of_length(3.363, 3),
        source=_APERTUS,
        read="file",
    ),
    SizedPair(
        verifier="Apertus-70B",
        drafter="Apertus-8B",
        verifier_parameters=70.6e9,
        drafter_parameters=8.05e9,
        task="open chat",
        acceptance=rate_of_length(2.895, 3),
        source=_APERTUS,
        read="file",
    ),
    SizedPair(
        verifier="Llama-3-70B Q4",
        drafter="Llama-3-8B Q4",
        verifier_parameters=70.6e9,
        drafter_parameters=8.03e9,
        task="four mixed prompts",
        acceptance=rate_of_length(1 + 8 * 0.5868, 8),
        source="devquasar.com: share of drafted tokens accepted, K = 8",
        read="file",
    ),
)
"""Pairs with a verifier of 70B, all with a drafter of 7B or 8B: where the curve of a 70B verifier is pinned."""


@dataclass(frozen=True)
class BenchmarkedLength:
    """Tokens per round, bonus included, of a drafter at a draft length that was not stated."""

    drafter: str
    drafter_parameters: float
    verifier: str
    verifier_parameters: float
    tokens: float
    source: str

    @property
    def least_rate(self) -> float:
        """The acceptance below which not even an endless draft commits so many tokens: 1 - 1 / tokens."""
        return 1 - 1 / self.tokens


_HSD = "HSD repository (arXiv 2601.05724), GSM8K, T = 1, GPTQ 8 bit, token-level verification"

UNPLACED: tuple[BenchmarkedLength, ...] = (
    BenchmarkedLength("Qwen2.5-0.5B", 0.494e9, "Qwen2.5-14B", 14.8e9, 5.99, _HSD),
    BenchmarkedLength("Qwen2.5-0.5B", 0.494e9, "Qwen2.5-32B", 32.8e9, 6.14, _HSD),
    BenchmarkedLength("Qwen2.5-0.5B", 0.494e9, "Qwen2.5-72B", 72.7e9, 6.44, _HSD),
)
"""Facts that no rate can be had from, because the draft length is missing; they bound it from below."""


@dataclass(frozen=True)
class PublishedOptimum:
    """A size that others found best; ``share`` of the verifier's parameters."""

    source: str
    verifier: str
    drafter: str
    share: float
    among: str
    latency: str
    read: Read


OPTIMA: tuple[PublishedOptimum, ...] = (
    PublishedOptimum(
        source="SDSL (arXiv 2603.11053), rule",
        verifier="13 verifiers (OPT, Qwen, ...)",
        drafter="M / 200",
        share=1 / 200,
        among="a fitted law",
        latency="in proportion to parameters",
        read="quoted",
    ),
    PublishedOptimum(
        source="SDSL (arXiv 2603.11053), example",
        verifier="70B",
        drafter="189M",
        share=0.189 / 70,
        among="a fitted law",
        latency="in proportion to parameters",
        read="quoted",
    ),
    PublishedOptimum(
        source="Decoding Speculative Decoding (arXiv 2402.01528)",
        verifier="LLaMA-65B",
        drafter="Wide-Sheared-LLaMA-796M",
        share=0.796 / 65,
        among="290M, 543M, 796M, 1.3B, wide and shallow",
        latency="measured; grows with depth",
        read="quoted",
    ),
    PublishedOptimum(
        source="Leviathan et al. 2023 (arXiv 2211.17192)",
        verifier="T5-XXL 11B",
        drafter="T5-small 77M",
        share=0.077 / 11,
        among="77M, 250M, 800M",
        latency="measured",
        read="quoted",
    ),
    PublishedOptimum(
        source="TensorRT-LLM on one H200, fp8, batch 1 (NVIDIA 2024)",
        verifier="Llama-3.3-70B",
        drafter="Llama-3.2-1B",
        share=1.236 / 70.6,
        among="1B, 3B, 8B",
        latency="measured",
        read="quoted",
    ),
)
"""Optima that disagree."""


@dataclass(frozen=True)
class MeasuredSpeedup:
    """A speed-up that others measured with a 70B verifier: what the extrapolation can be held against.

    ``draft_tokens`` None: not stated, the best is taken. ``tokens``: measured tokens per round, where they are known.
    """

    source: str
    verifier: str
    drafter: str
    device: str
    tensor_parallel: int
    dtype: Literal["bf16", "fp8"]
    speedup: float
    draft_tokens: int | None
    tokens: float | None
    read: Read


SPEEDUPS: tuple[MeasuredSpeedup, ...] = (
    MeasuredSpeedup(
        source="TensorRT-LLM (NVIDIA 2024), 51.14 to 181.74 tokens/s",
        verifier="llama-3.1-70b",
        drafter="llama-3.2-1b",
        device="h200",
        tensor_parallel=1,
        dtype="fp8",
        speedup=3.55,
        draft_tokens=None,
        tokens=None,
        read="quoted",
    ),
    MeasuredSpeedup(
        source=_APERTUS + ", code, batch 1",
        verifier="llama-3.1-70b",
        drafter="llama-3.1-8b",
        device="h100-sxm",
        tensor_parallel=4,
        dtype="bf16",
        speedup=0.464,
        draft_tokens=3,
        tokens=3.377,
        read="file",
    ),
)
"""One that agrees with cheap drafting, one that shows what an engine's overhead can do."""


@dataclass(frozen=True)
class Facts:
    """All that an extrapolation rests on; by default what is listed here."""

    families: tuple[SizedPair, ...] = FAMILIES
    anchors: tuple[SizedPair, ...] = ANCHORS
    speedups: tuple[MeasuredSpeedup, ...] = SPEEDUPS
    unplaced: tuple[BenchmarkedLength, ...] = UNPLACED
