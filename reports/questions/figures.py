"""The figures of a report, drawn with seaborn as SVG; each comes with its caption, its label and its alt text."""

from __future__ import annotations

from collections.abc import Callable

from analysis.speedup.findings import Findings
from reports.page.drawing import Drawing, styled
from reports.questions import speedup_figures as acceptance
from reports.questions import speedup_figures as costs
from reports.questions import speedup_figures as speedup

__all__ = ["Drawing", "draw_all"]


def draw_all(findings: Findings, progress: Callable[[int, int], None] | None = None) -> dict[str, Drawing]:
    """Draw every figure that the findings have data for, by name; the cost fit only where costs were fitted.

    Raises `ReportError` that names the figure and what it lacked.
    """
    painters: list[Callable[[Findings], Drawing]] = [
        speedup.speedup_by_batch,
        acceptance.acceptance_by_domain,
        acceptance.depth_curves,
        acceptance.formula_error,
        speedup.speedup_map,
        costs.time_breakdown,
    ]
    if findings.cost_fits:
        painters.append(costs.cost_fit)
    drawings = {}
    with styled():
        for done, painter in enumerate(painters, start=1):
            drawing = painter(findings)
            drawings[drawing.name] = drawing
            if progress is not None:
                progress(done, len(painters))
    return drawings
