"""Findings as a document: a tagged PDF with vector figures, and a table for the terminal."""

from reports.writing.report import write_report
from reports.writing.terminal import definitions_table, summary_table

__all__ = ["definitions_table", "summary_table", "write_report"]
