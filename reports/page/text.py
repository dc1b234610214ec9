"""Words and numbers as they appear in a report. Names come from users: they are shown, never interpreted.

Also the words and cells for errors of predictions and for acceptance as predicted and as engines counted it, which
the document, the Markdown table and the terminal share.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from analysis.common.bootstrap import Estimate
from analysis.fidelity.counts import MATERIAL, NOT_COUNTED, Count, Split, disagreements, number
from analysis.fidelity.table import Compared, Condition, Errors, Fidelity
from analysis.speedup.findings import Findings
from calibration.traces.grades import PER_ROUND, RECORDED, SYNTHESISED, Grade

_RANGES = ((0x20, 0x7E), (0xA0, 0x17F), (0x370, 0x3FF), (0x400, 0x45F), (0x2010, 0x2026))
_SIGNS = frozenset("\u2190\u2192\u2212\u2248\u2264\u2265")
_ZERO_WIDTH_SPACE = "\u200b"

DASH = "\u2013"
TIMES = "\u00d7"


def plain(text: str) -> str:
    """Give `text` in characters that the report's font has; others show as their code, as ``\\u{4e2d}``."""
    return "".join(c if _printable(c) else f"\\u{{{ord(c):x}}}" for c in text)


def _printable(character: str) -> bool:
    code = ord(character)
    known = any(low <= code <= high for low, high in _RANGES) or character in _SIGNS
    return known and unicodedata.category(character) not in {"Cc", "Cf", "Cn", "Co", "Cs", "Mn", "Zl", "Zp"}


def short(name: str, limit: int = 24) -> str:
    """Give a name that fits a figure or a table cell, its middle left out if it must be."""
    shown = plain(name)
    if len(shown) <= limit:
        return shown
    head = (limit - 1) * 2 // 3
    return shown[:head] + "\u2026" + shown[len(shown) - (limit - 1 - head) :]


def breakable(text: str, limit: int = 24) -> str:
    """Give `text` with invisible places to break in words longer than `limit`, so that no line overflows."""
    words = []
    for word in plain(text).split(" "):
        pieces = [word[i : i + limit // 2] for i in range(0, len(word), limit // 2)]
        words.append(_ZERO_WIDTH_SPACE.join(pieces) if len(word) > limit else word)
    return " ".join(words)


def named(name: str) -> str:
    """Give a name as it stands in a sentence: long ones shortened, the rest with places to break."""
    return breakable(short(name, 48))


def estimate(value: Estimate, digits: int = 2) -> str:
    """``1.17 (1.10-1.25)`` with an en dash; an em dash where undefined; no bracket where no interval exists."""
    if value.value is None:
        return "\u2014"
    if value.low is None or value.high is None:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} ({value.low:.{digits}f}{DASH}{value.high:.{digits}f})"


def percent(value: Estimate, digits: int = 0) -> str:
    """A share in percent, without the percent sign, with its interval: ``+12 (+9 to +15)``."""
    if value.value is None:
        return "\u2014"
    text = signed(value.value, digits)
    if value.low is None or value.high is None:
        return text
    return f"{text} ({signed(value.low, digits)} to {signed(value.high, digits)})"


def signed(share: float, digits: int = 0) -> str:
    """A share in percent with its sign; no sign where it rounds to 0."""
    text = f"{100 * share:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\u2212")


def count(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{value:,.0f}"


def parameters(value: int | None) -> str:
    """A number of parameters: ``134.5 M``, ``0``, or ``unknown``."""
    if value is None:
        return "unknown"
    for size, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)


def listing(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(words) <= 1:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def sim_label(findings: Findings) -> str:
    """Label of simulated numbers, which says so when their costs were not fitted to timings."""
    return "simulated" if findings.cost_source == "fitted" else f"simulated with {findings.cost_source} costs"


def acceptance_label(findings: Findings) -> str:
    """Label of acceptance and of sizes, by its grade: *measured* where they were recorded here."""
    evidence = findings.provenance.evidence
    return "measured" if evidence is None else _LABELS[evidence.acceptance]


_LABELS: dict[Grade, str] = {RECORDED: "measured", PER_ROUND: "imported", SYNTHESISED: "synthesised"}


def sample(findings: Findings) -> str:
    """Sample size for a caption: ``n = 72 requests``; a range where drafters were recorded on different ones."""
    counts = findings.sizes.requests_by_drafter.values()
    if min(counts) == max(counts):
        return f"n = {max(counts)} requests"
    return f"n = {min(counts)} to {max(counts)} requests by drafter"


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


SUMMARISED = {
    "output_throughput": "throughput",
    "speedup": "speed-up",
    "mean_tpot_ms": "mean TPOT",
    "p99_tpot_ms": "p99 TPOT",
    "mean_ttft_ms": "mean TTFT",
    "step_ms": "time of a round",
    "spec_decode_acceptance_length": "accepted length",
}
"""Quantities that errors are summed up for, in this order -> short names."""


def error_cells(errors: Errors) -> tuple[str, str, str, str, str]:
    """Give n, median, worst, bias and spread as text."""
    return (
        count(errors.conditions),
        f"{100 * errors.median:.1f}%",
        f"{100 * errors.worst:.1f}%",
        f"{100 * errors.bias:+.1f}%".replace("-", "\u2212"),
        "\u2014" if errors.spread is None else f"{100 * errors.spread:.1f}%",
    )


def error_with_spread(one: Compared) -> str:
    """Give the signed error in per cent, with the spread of the repeats behind ± where there were any."""
    spread = "" if one.spread is None else f" ±{100 * one.spread:.1f}"
    return f"{100 * one.error:+.1f}%{spread}"
