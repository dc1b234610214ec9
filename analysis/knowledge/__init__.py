"""Generalist or specialists: paired comparison, transfer between domains, and the worth of a router."""

from analysis.knowledge.findings import KnowledgeFindings
from analysis.knowledge.study import study_knowledge

__all__ = ["KnowledgeFindings", "study_knowledge"]
