"""Train a student on the verifier's text: resumable, with a learning curve on held-out text.

The verifier's distributions come from the stored states through its head; only on-policy batches run it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration.common.progress import StageProgress
from calibration.models.lane import Lane, generate, pad_right
from calibration.models.load import Verifier
from calibration.models.sampling import generator_for
from calibration.traces.manifest import DecodingInfo
from calibration.trained.corpus import Batch, Text, collate
from calibration.trained.evaluate import Quality, evaluate
from calibration.trained.shapes import KangarooShape, NestedShape, StudentShape, TrainSettings
from calibration.trained.trainees import make_trainee
from calibration.training.learner import Learner, training_dtype
from calibration.training.online import ResumableTraining


@dataclass(frozen=True)
class Trained:
    """A trained student: its model, final quality on the held-out text, and its learning curve."""

    student: Any
    quality: Quality
    curve: list[dict[str, float]]
    seconds: float


def train_student(
    verifier: Verifier,
    shape: StudentShape | NestedShape | KangarooShape,
    texts: Sequence[Text],
    held_out: Sequence[Text],
    decoding: DecodingInfo,
    settings: TrainSettings,
    folder: Path | str,
    progress: StageProgress | None = None,
) -> Trained:
    """Train a student of `shape` for ``settings.tokens`` output tokens; write it to `folder` with ``curve.csv``.

    An interrupted call goes on from its last checkpoint, and gives what an uninterrupted one gives. `decoding` says
    how `held_out` was written. `CalibrationError` where `folder` or its checkpoint belongs to something else.
    """
    run = Training(
        verifier=verifier,
        shape=shape,
        texts=texts,
        held_out=held_out,
        decoding=decoding,
        settings=settings,
        folder=Path(folder),
    )
    run.resume()
    run.go(progress)
    return run.finish()


class Training(ResumableTraining):
    """The training of one student."""

    shape: StudentShape | NestedShape | KangarooShape
    learner: Learner

    def __init__(
        self,
        verifier: Verifier,
        shape: StudentShape | NestedShape | KangarooShape,
        texts: Sequence[Text],
        held_out: Sequence[Text],
        decoding: DecodingInfo,
        settings: TrainSettings,
        folder: Path,
    ) -> None:
        super().__init__(verifier, shape, texts, held_out, decoding, settings, folder)
        generator = generator_for(verifier.device, settings.seed)
        trainee = make_trainee(verifier, shape, generator, training_dtype(verifier))
        self.student = trainee.model
        self.learner = Learner(verifier, trainee, texts, settings)

    def finish(self) -> Trained:
        """Write the drafter and its curve; take the checkpoint away."""
        kept = {"shape": self.shape.model_dump(exclude_none=True)}
        quality = Quality(**self._write(self.learner.trainee.kind, kept, kept))
        return Trained(self.student, quality, self.state.curve, self.state.seconds)

    def _learn(self, texts: Sequence[Text], step: int, rate: float) -> tuple[float, int]:
        batch = self._batch(texts, step)
        return self.learner.step(batch, rate, self.settings.seed, step), len(batch.targets)

    def _quality_row(self) -> dict[str, Any]:
        return evaluate(self.student, self.verifier, self.held_out, self.decoding).row()

    def _batch(self, texts: Sequence[Text], step: int) -> Batch:
        """Give the batch of a step: the verifier's text, or, for its share of steps, the student's own."""
        rng = np.random.default_rng([self.settings.seed, step])
        if rng.random() >= self.settings.on_policy:
            return collate(texts, self.verifier.device)
        with self.learner.precision():
            return collate(self._own_texts(texts, step), self.verifier.device)

    def _own_texts(self, texts: Sequence[Text], step: int) -> list[Text]:
        """Let the student write to the prompts of `texts`, and the verifier read what it wrote."""
        decoding = DecodingInfo(mode="sampled", temperature=self.settings.temperature)
        generator = generator_for(self.verifier.device, self.settings.seed, step)
        length = max(len(text.output_ids) for text in texts)
        prompts = [text.prompt_ids for text in texts]
        written = generate(self.student, prompts, decoding, length, self.verifier.end_ids, generator)
        outputs = [out.ids for out in written]
        lane = Lane(self.verifier.model, len(texts), taps=("norm",))
        rows = [(*prompt, *out[:-1]) for prompt, out in zip(prompts, outputs, strict=True)]
        with torch.inference_mode():
            lane.feed(*pad_right(rows, self.verifier.device), last=1)
        states = lane.tapped["norm"].to(torch.float16).cpu().numpy()
        return [
            dataclasses.replace(text, output_ids=out, states=row[len(prompt) - 1 : len(prompt) - 1 + len(out)])
            for text, prompt, out, row in zip(texts, prompts, outputs, states, strict=True)
        ]
