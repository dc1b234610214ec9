"""Acceptance as predicted and as engines counted it, and whose an error is: words and cells for all pages."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.fidelity.counts import MATERIAL, NOT_COUNTED, Count, disagreements, number
from analysis.fidelity.split import Split
from analysis.fidelity.table import Condition, Fidelity
from reports.page.text import listing

COUNT_HEADER = ("condition", "drafts", "drafted tokens", "tokens per round", "accepted at position 1, 2, ..")
SPLIT_HEADER = ("condition", "mean end-to-end time", "acceptance", "step time", "queue")
COUNT_NOTE = (
    "Predicted / counted, a repeat each: drafts, drafted tokens, tokens per round (bonus included, rounds without a "
    "draft too), and the share of all drafts whose token at position 1, 2, .. was accepted."
)
SPLIT_NOTE = (
    "The error of the mean end-to-end time, and what acceptance (tokens per round), step time (the measured steps, "
    "priced as predicted) and queue (waiting, and which requests share a step) contribute: the three, each plus one, "
    "multiply to the whole plus one."
)

SPLIT_DEFINITION = (
    "A request waits W for its first token, then spends D in steps that decode and P while prompts of others are "
    "prefilled alone: E = W + P + D. Acceptance multiplies D by measured over predicted tokens per round (and by "
    "what drafts as long as predicted make of a step). Step time multiplies W + P and D by predicted over measured "
    "seconds "
    "of the measured steps of each kind. Queue is what is left to the predicted E: what acceptance and step times do "
    "to the number of requests that wait counts there."
)


def counted(fidelity: Fidelity) -> tuple[Condition, ...]:
    """Give the conditions in which drafts are compared."""
    return tuple(one for one in fidelity.conditions if one.counts)


def acceptance_lines(fidelity: Fidelity) -> list[str]:
    """Give what is said first of a validation: every condition whose counts are far off, then how many agree."""
    return [*far_off(fidelity), acceptance_sentence(fidelity)]


def far_off(fidelity: Fidelity) -> list[str]:
    """Give a line for every condition whose counts differ materially, the largest difference first."""
    return disagreements([(f"{one.source}: {one.name}", one.counts) for one in counted(fidelity)])


def acceptance_sentence(fidelity: Fidelity) -> str:
    """Say in how many conditions acceptance was predicted as the engine counted it."""
    some = counted(fidelity)
    if not some:
        under = any(one.speculates for one in fidelity.conditions)
        if not under:
            return "Acceptance: no condition ran under speculation, so there are no drafts to compare."
        return f"Acceptance: drafts were {NOT_COUNTED} in any condition."
    told = [one for one in some if any(count.counted is not None for count in one.counts)]
    late = sum(any(count.material for count in one.counts) for one in told)
    said = f"Acceptance: counts agree within {100 * MATERIAL:.0f}%, or within chance, in {len(told) - late} of "
    said += f"{len(told)} conditions whose drafts were counted"
    silent = len(some) - len(told)
    return said + (f"; {silent} {NOT_COUNTED}." if silent else ".")


def count_cells(condition: Condition) -> tuple[str, ...]:
    """Give predicted / counted of a condition under `COUNT_HEADER`, without its name."""
    by_name = {one.name: one for one in condition.counts}
    single = [_both(by_name[name]) for name in ("drafts", "drafted_tokens", "tokens_per_round")]
    return (*single, _positions([one for one in condition.counts if one.name.startswith("accepted_at_")]))


def _both(one: Count) -> str:
    return f"{number(one.predicted)} / {NOT_COUNTED if one.counted is None else number(one.counted)}"


def _positions(several: Sequence[Count]) -> str:
    if not several:
        return "none"
    told = [one.counted for one in several if one.counted is not None]
    predicted = " ".join(f"{one.predicted:.2f}" for one in several)
    return f"{predicted} / {' '.join(f'{value:.2f}' for value in told) if told else NOT_COUNTED}"


def split_cells(split: Split) -> tuple[str, ...]:
    """Give the errors of a condition under `SPLIT_HEADER`, without its name."""
    apart = [
        "not told apart" if part is None else f"{100 * part:+.1f}%" for part in (split.acceptance, split.step_time)
    ]
    mixed = [
        name for name, part in (("acceptance", split.acceptance), ("step time", split.step_time)) if part is None
    ]
    queue = f"{100 * split.queue:+.1f}%" + (f" (with {listing(mixed)})" if mixed else "")
    return (f"{100 * split.whole:+.1f}%", *apart, queue)
