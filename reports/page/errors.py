"""Words for errors of predictions, shared by the document, the Markdown table and the terminal."""

from __future__ import annotations

from analysis.fidelity.table import Compared, Errors
from reports.page.text import count

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
