"""Findings as a document: a tagged PDF with vector figures, and a table for the terminal."""

from reports.report import write_report
from reports.terminal import summary_table

__all__ = ["summary_table", "write_report"]
