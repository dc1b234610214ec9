"""Distillation: train drafters of our own from a verifier's text, by size and by knowledge.

`load_distill_job` and `run_distill` do a whole job; `write_corpus` lets a verifier write training text, and
`train_student` makes one drafter from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.trained.corpus import Text, corpus_decoding, read_corpus, write_corpus
    from calibration.trained.evaluate import Quality
    from calibration.trained.shapes import KangarooShape, NestedShape, StudentShape, TrainSettings
    from calibration.training.jobfile import DistillJob, load_distill_job, parse_distill_job
    from calibration.training.run import StudentResult, run_distill
    from calibration.training.train import train_student

_HOME = {
    "DistillJob": "calibration.training.jobfile",
    "KangarooShape": "calibration.trained.shapes",
    "NestedShape": "calibration.trained.shapes",
    "Quality": "calibration.trained.evaluate",
    "StudentResult": "calibration.training.run",
    "StudentShape": "calibration.trained.shapes",
    "Text": "calibration.trained.corpus",
    "TrainSettings": "calibration.trained.shapes",
    "corpus_decoding": "calibration.trained.corpus",
    "load_distill_job": "calibration.training.jobfile",
    "parse_distill_job": "calibration.training.jobfile",
    "read_corpus": "calibration.trained.corpus",
    "run_distill": "calibration.training.run",
    "train_student": "calibration.training.train",
    "write_corpus": "calibration.trained.corpus",
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
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'calibration.training' has no attribute '{name}'")
