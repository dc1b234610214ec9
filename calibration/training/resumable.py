"""A training to a budget of tokens: resumable, with a learning curve on held-out text.

Checkpoints, the curve and the finished drafter lie in ``<folder>.partial`` until the folder itself appears.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.common.files import check_identity
from calibration.common.progress import StageProgress
from calibration.models.load import Verifier
from calibration.traces.manifest import DecodingInfo
from calibration.trained.batches import steps
from calibration.trained.corpus import Text
from calibration.trained.folder import save_drafter
from calibration.trained.settings import TrainSettings
from calibration.training.learner import Descent

PROGRESS = ("tokens", "seconds", "loss")
"""First columns of ``curve.csv``: training tokens and seconds so far, mean loss since the last row."""


@dataclass
class Progression:
    """How far a training has come: what a checkpoint keeps beside weights and optimiser."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)


class ResumableTraining(ABC):
    """One training: what learns, its progression, and its checkpoint on disk.

    A kind of training sets `learner`, and says what a step is and what is measured on the held-out text.
    """

    learner: Descent

    def __init__(
        self,
        verifier: Verifier,
        shape: BaseModel,
        texts: Sequence[Text],
        held_out: Sequence[Text],
        decoding: DecodingInfo,
        settings: TrainSettings,
        folder: Path,
    ) -> None:
        if not texts or not held_out:
            raise CalibrationError("training: must have texts to learn from and held-out ones, got none")
        self.verifier, self.shape, self.settings, self.folder = verifier, shape, settings, folder
        self.texts, self.held_out, self.decoding = texts, held_out, decoding
        self.partial = folder.with_name(folder.name + ".partial")
        self.state = Progression()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensors that are trained, and saved."""
        return self.learner.weights

    @abstractmethod
    def _learn(self, texts: Sequence[Text], step: int, rate: float) -> tuple[float, int]:
        """Take step number `step` at the learning rate `rate`; give its loss and the output tokens learnt from."""

    @abstractmethod
    def _quality_row(self) -> Mapping[str, float]:
        """Measure the quality on the held-out text, by name."""

    def go(self, progress: StageProgress | None = None) -> None:
        """Train until the budget is spent, with a curve row and a checkpoint at every mark passed."""
        settings, state = self.settings, self.state
        if not state.curve:
            self._measure()
        for step, rows in enumerate(steps(self.texts, settings.batch_tokens, settings.seed)):
            if state.tokens >= settings.tokens:
                break
            if step < state.step:
                continue
            if progress:
                progress(f"train {self.folder.name}", state.tokens, settings.tokens)
            begin, before = time.perf_counter(), state.tokens
            rate = settings.learning_rate * settings.rate(before)
            loss, count = self._learn([self.texts[i] for i in rows], step, rate)
            state.step, state.tokens = step + 1, before + count
            state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
            state.seconds += time.perf_counter() - begin
            if state.tokens >= settings.tokens or _passes(before, state.tokens, settings.curve_tokens):
                self._measure()
            if _passes(before, state.tokens, settings.checkpoint_tokens):
                self._save()
        if progress:
            progress(f"train {self.folder.name}", settings.tokens, settings.tokens)

    def resume(self) -> None:
        """Go back to the last checkpoint, if there is one; `CalibrationError` where it is of another training."""
        path = self.partial / "checkpoint.pt"
        if not path.is_file():
            return
        kept = torch.load(path, map_location=self.verifier.device, weights_only=True)
        check_identity(self.partial, "training", kept["identity"], self._identity())
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(kept["weights"][name])
        self.learner.optimiser.load_state_dict(kept["optimiser"])
        self.state = Progression(**kept["state"])

    def _write(self, kind: str, kept: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Write the drafter and its curve, take the checkpoint away; give the quality last measured."""
        quality = {name: value for name, value in self.state.curve[-1].items() if name not in PROGRESS}
        recipe = {
            **recipe,
            "settings": self.settings.model_dump(),
            "texts": len(self.texts),
            "domains": sorted({text.domain for text in self.texts}),
            "tokens": self.state.tokens,
            "seconds": round(self.state.seconds, 2),
            "held_out": quality,
        }
        save_drafter(self.folder, kind, kept, self.verifier.info, self.weights, recipe)
        (self.folder / "curve.csv").write_text(_curve_csv(self.state.curve), encoding="utf-8")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.learner.rest()
        return quality

    def _save(self) -> None:
        """Write a checkpoint; the older one stays until the new one is whole."""
        self.partial.mkdir(parents=True, exist_ok=True)
        scratch = self.partial / ".checkpoint.tmp"
        kept = {
            "identity": self._identity(),
            "weights": {name: tensor.detach() for name, tensor in self.weights.items()},
            "optimiser": self.learner.optimiser.state_dict(),
            "state": dataclasses.asdict(self.state),
        }
        torch.save(kept, scratch)
        os.replace(scratch, self.partial / "checkpoint.pt")
        (self.partial / "curve.csv").write_text(_curve_csv(self.state.curve), encoding="utf-8")

    def _identity(self) -> dict[str, Any]:
        return {
            "verifier": self.verifier.info.name,
            "shape": self.shape.model_dump(),
            "settings": self.settings.model_dump(),
            "texts": [len(self.texts), len(self.held_out)],
        }

    def _measure(self) -> None:
        """Add a row to the learning curve."""
        state = self.state
        loss = state.loss_sum / state.loss_count if state.loss_count else float("nan")
        progress = dict(zip(PROGRESS, (state.tokens, round(state.seconds, 2), round(loss, 5)), strict=True))
        state.curve.append({**progress, **self._quality_row()})
        state.loss_sum, state.loss_count = 0.0, 0


def _curve_csv(curve: Sequence[dict[str, float]]) -> str:
    """Write a learning curve as CSV; a loss that is not known yet is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, curve[0].keys(), lineterminator="\n")
    writer.writeheader()
    for row in curve:
        writer.writerow({name: "" if value != value else value for name, value in row.items()})
    return text.getvalue()


def _passes(before: int, after: int, every: int) -> bool:
    return before // every != after // every
