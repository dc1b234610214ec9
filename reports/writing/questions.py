"""The questions about one TraceSet: each gives findings, or raises a `PacelineError` that says what is lacking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.traces import TraceSet
from reports.page.document import Part

Step = Callable[[int, int], None]
Reply = tuple[Part, Any]


@dataclass(frozen=True)
class TraceQuestion:
    """A question about a TraceSet and the folder it was read from."""

    key: str
    title: str
    ask: Callable[[TraceSet, Path, Step], Reply]


def _size(traces: TraceSet, folder: Path, step: Step) -> Reply:
    from analysis.size import study_size
    from reports.questions.size import size_part

    findings = study_size(traces)
    return size_part(findings), findings


def _laws(traces: TraceSet, folder: Path, step: Step) -> Reply:
    """Laws of what the TraceSet has; learning curves, where it was distilled, lie beside it."""
    from analysis.laws.find import find_laws
    from reports.questions.laws import laws_part

    curves = folder / "recipe" / "curves.csv"
    findings = find_laws(family=traces, curves=curves if curves.is_file() else None, traces=traces)
    return laws_part(findings), findings


def _tokens(traces: TraceSet, folder: Path, step: Step) -> Reply:
    from analysis.tokens.study import study_tokens
    from reports.questions.tokens import tokens_part

    findings = study_tokens(traces)
    return tokens_part(findings), findings


def _knowledge(traces: TraceSet, folder: Path, step: Step) -> Reply:
    from analysis.knowledge import study_knowledge
    from reports.questions.knowledge import knowledge_part

    findings = study_knowledge(traces, progress=step)
    return knowledge_part(findings), findings


def _routing(traces: TraceSet, folder: Path, step: Step) -> Reply:
    from analysis.routing.study import study_routing
    from reports.questions.routing import routing_part

    findings = study_routing(traces, progress=step)
    return routing_part(findings), findings


QUESTIONS = (
    TraceQuestion("size", "Drafter size", _size),
    TraceQuestion("laws", "Scaling laws", _laws),
    TraceQuestion("tokens", "Acceptance token by token", _tokens),
    TraceQuestion("knowledge", "Generalist or specialists", _knowledge),
    TraceQuestion("routing", "Routing between drafters", _routing),
)
"""In the order of the report."""
