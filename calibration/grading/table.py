"""The table of graded quality: a row per item and stage, and a manifest beside it that says how it was made.

    item, domain, stage        names; stages from the cheapest to the dearest
    correct                    1 where the likeliest option is the right one, else 0
    cost                       seconds of the stage for one item (median over timed items; see the manifest)
    confidence                 softmax over the options' log-likelihoods: that of the likeliest
    margin                     the likeliest less the second
    entropy                    of that softmax, in nats
    item_prompt_tokens         tokens of the prompt, the two worked examples included, the options not

Signals are what an engine would know of the stage's answer when it has it; none of them knows the right option.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.grading.builtin import Item

COLUMNS = ("item", "domain", "stage", "correct", "cost", "confidence", "margin", "entropy", "item_prompt_tokens")
_Z = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


@dataclass(frozen=True)
class Grade:
    """One stage's answer to one item. `exact`: greedy decoding begins with the right answer."""

    item: Item
    stage: str
    correct: bool
    exact: bool
    confidence: float
    margin: float
    entropy: float
    prompt_tokens: int


def grade(item: Item, stage: str, log_likelihood: NDArray[np.float64], exact: bool, prompt_tokens: int) -> Grade:
    """Give the grade of one answer from the options' summed log-probabilities (not normalised by length).

    The answer is the likeliest option, the first of equals.
    """
    p = np.exp(log_likelihood - log_likelihood.max())
    p /= p.sum()
    ordered = np.sort(p)[::-1]
    entropy = float(-(p[p > 0] * np.log(p[p > 0])).sum())
    chosen = int(np.argmax(log_likelihood))
    return Grade(
        item=item,
        stage=stage,
        correct=chosen == item.right,
        exact=exact,
        confidence=float(ordered[0]),
        margin=float(ordered[0] - ordered[1]),
        entropy=max(entropy, 0.0),
        prompt_tokens=prompt_tokens,
    )


def to_csv(grades: Sequence[Grade], costs: dict[str, float]) -> str:
    """Give the table as text: rows by item, then by stage; five significant digits."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(COLUMNS)
    for g in grades:
        signals = (f"{value:.5g}" for value in (costs[g.stage], g.confidence, g.margin, g.entropy))
        writer.writerow([g.item.id, g.item.domain, g.stage, int(g.correct), *signals, g.prompt_tokens])
    return sink.getvalue()


def wilson(right: int, items: int) -> tuple[float, float]:
    """Give the 95% interval of a proportion (Wilson 1927): (low, high)."""
    rate, z2 = right / items, _Z * _Z
    centre = (rate + z2 / (2 * items)) / (1 + z2 / items)
    half = _Z / (1 + z2 / items) * float(np.sqrt(rate * (1 - rate) / items + z2 / (4 * items * items)))
    return max(0.0, centre - half), min(1.0, centre + half)


def summary(grades: Sequence[Grade], stages: Sequence[str]) -> dict[str, Any]:
    """Give, per stage, over all items and per domain: items, quality with its 95% interval, chance, greedy answers.

    `quality`: share answered rightly, of options; `chance`: that of blind guesses; `greedy_exact`: share where greedy
    decoding begins with the right answer, without options to choose from.
    """
    domains = tuple(dict.fromkeys(g.item.domain for g in grades))
    told = {}
    for stage in stages:
        mine = [g for g in grades if g.stage == stage]
        by_domain = {domain: _rates([g for g in mine if g.item.domain == domain]) for domain in domains}
        told[stage] = {**_rates(mine), "domains": by_domain}
    return told


def _rates(grades: Sequence[Grade]) -> dict[str, Any]:
    right = sum(g.correct for g in grades)
    low, high = wilson(right, len(grades))
    return {
        "items": len(grades),
        "quality": round(right / len(grades), 4),
        "quality_95": [round(low, 4), round(high, 4)],
        "chance": round(float(np.mean([g.item.chance for g in grades])), 4),
        "greedy_exact": round(sum(g.exact for g in grades) / len(grades), 4),
    }


def paired(grades: Sequence[Grade], stages: Sequence[str]) -> list[dict[str, Any]]:
    """Compare neighbouring stages on the same items: who is right alone, and the gain with its 95% interval.

    Interval of a paired difference of proportions by the normal approximation (Newcombe 1998, method 5 without
    continuity): (b - c) / n +- z sqrt(b + c - (b - c)^2 / n) / n.
    """
    told = []
    for below, above in itertools.pairwise(stages):
        first, second = (np.array([g.correct for g in grades if g.stage == s], dtype=int) for s in (below, above))
        n, gained, lost = len(first), int(((second - first) > 0).sum()), int(((second - first) < 0).sum())
        gain = (gained - lost) / n
        half = _Z * float(np.sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0.0))) / n
        told.append(
            {
                "from": below,
                "to": above,
                "gained_items": gained,
                "lost_items": lost,
                "gain": round(gain, 4),
                "gain_95": [round(gain - half, 4), round(gain + half, 4)],
            }
        )
    return told
