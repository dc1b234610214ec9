"""Words and numbers as they appear in a report. Names come from users: they are shown, never interpreted."""

from __future__ import annotations

import unicodedata

from analysis.common.bootstrap import Estimate
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
