"""What one question contributes to a report: its answer, its section, its advice and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from reports.page.document import Block, Paragraph
from reports.page.drawing import Drawing
from simulator.results.evidence import Evidence


@dataclass(frozen=True)
class Part:
    """One question answered.

    ``answer`` goes to the front page (its lead is the question in two or three words), ``blocks`` under ``title``;
    ``guidelines`` are advice in plain words, ``limits`` what the numbers do not cover. ``drawings`` are the figures
    that ``blocks`` show, for the files beside the report. ``evidence``: what its numbers stand on, where they are
    simulated.
    """

    key: str
    title: str
    answer: Paragraph
    blocks: tuple[Block, ...]
    drawings: tuple[Drawing, ...]
    guidelines: tuple[Paragraph, ...] = ()
    limits: tuple[Paragraph, ...] = ()
    evidence: Evidence | None = None
