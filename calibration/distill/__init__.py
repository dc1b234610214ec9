"""Distillation: train drafters of our own from a verifier's text, by size and by knowledge.

`load_distill_job` and `run_distill` do a whole job; `write_corpus` lets a verifier write training text, and
`train_student` makes one drafter from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.distill.corpus import Text, corpus_decoding, read_corpus, write_corpus
    from calibration.distill.evaluate import Quality
    from calibration.distill.jobfile import DistillJob, load_distill_job, parse_distill_job
    from calibration.distill.run import StudentResult, run_distill
    from calibration.distill.settings import TrainSettings
    from calibration.distill.shapes import KangarooShape, NestedShape, StudentShape
    from calibration.distill.train import train_student

_HOME = {
    "DistillJob": "jobfile",
    "KangarooShape": "shapes",
    "NestedShape": "shapes",
    "Quality": "evaluate",
    "StudentResult": "run",
    "StudentShape": "shapes",
    "Text": "corpus",
    "TrainSettings": "settings",
    "corpus_decoding": "corpus",
    "load_distill_job": "jobfile",
    "parse_distill_job": "jobfile",
    "read_corpus": "corpus",
    "run_distill": "run",
    "train_student": "train",
    "write_corpus": "corpus",
}

__all__ = [
    "DistillJob",
    "KangarooShape",
    "NestedShape",
    "Quality",
    "StudentResult",
    "StudentShape",
    "Text",
    "TrainSettings",
    "corpus_decoding",
    "load_distill_job",
    "parse_distill_job",
    "read_corpus",
    "run_distill",
    "train_student",
    "write_corpus",
]


def __getattr__(name: str) -> Any:
    # A job file must be readable without torch, which training needs.
    if name in _HOME:
        return getattr(importlib.import_module(f"calibration.distill.{_HOME[name]}"), name)
    raise AttributeError(f"module 'calibration.distill' has no attribute '{name}'")
