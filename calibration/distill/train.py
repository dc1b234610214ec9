"""Train a student on the verifier's text: resumable, with a learning curve on held-out text.

The verifier's distributions come from the stored states through its head; only on-policy batches run it. Checkpoints,
the curve and the finished drafter lie in ``<folder>.partial`` until the folder itself appears.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration.distill.batches import Batch, collate, steps
from calibration.distill.corpus import Text
from calibration.distill.evaluate import Quality, evaluate
from calibration.distill.learner import Learner, training_dtype
from calibration.distill.settings import TrainSettings
from calibration.distill.shapes import KangarooShape, NestedShape, StudentShape
from calibration.distill.trainees import make_trainee
from calibration.drafters.folder import save_drafter
from calibration.errors import CalibrationError
from calibration.fetch import Progress
from calibration.generate import generate
from calibration.lane import Lane, pad_right
from calibration.models import Verifier
from calibration.sampling import generator_for
from calibration.traces.manifest import DecodingInfo

CURVE = ("tokens", "seconds", "loss", "match", "overlap", "tokens_per_round", "held_out_tokens")
"""Columns of ``curve.csv``: training tokens and seconds so far, mean loss since the last row, then `Quality`."""


@dataclass
class Progression:
    """How far a training has come: what a checkpoint keeps beside weights and optimiser."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)


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
    progress: Progress | None = None,
) -> Trained:
    """Train a student of `shape` for ``settings.tokens`` output tokens; write it to `folder` with ``curve.csv``.

    An interrupted call goes on from its last checkpoint, and gives what an uninterrupted one gives. `decoding` says
    how `held_out` was written. `CalibrationError` where `folder` or its checkpoint belongs to something else.
    """
    run = Training(verifier, shape, texts, held_out, decoding, settings, Path(folder))
    run.resume()
    run.go(progress)
    return run.finish()


class Training:
    """One training: student, optimiser, progression, and its checkpoint on disk."""

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
        if not texts or not held_out:
            raise CalibrationError("training: must have texts to learn from and held-out ones, got none")
        self.verifier, self.shape, self.settings, self.folder = verifier, shape, settings, folder
        self.texts, self.held_out, self.decoding = texts, held_out, decoding
        self.partial = folder.with_name(folder.name + ".partial")
        generator = generator_for(verifier.device, settings.seed)
        trainee = make_trainee(verifier, shape, generator, training_dtype(verifier))
        self.student, self.weights = trainee.model, trainee.weights
        self.learner = Learner(verifier, trainee, texts, settings)
        self.state = Progression()

    def go(self, progress: Progress | None = None) -> None:
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
            batch = self._batch([self.texts[i] for i in rows], step)
            rate = settings.learning_rate * settings.rate(state.tokens)
            loss = self.learner.step(batch, rate, settings.seed, step)
            state.step, state.tokens = step + 1, before + len(batch.targets)
            state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
            state.seconds += time.perf_counter() - begin
            if state.tokens >= settings.tokens or _passes(before, state.tokens, settings.curve_tokens):
                self._measure()
            if _passes(before, state.tokens, settings.checkpoint_tokens):
                self._save()
        if progress:
            progress(f"train {self.folder.name}", settings.tokens, settings.tokens)

    def finish(self) -> Trained:
        """Write the drafter and its curve; take the checkpoint away."""
        quality = _quality(self.state.curve[-1])
        recipe = {
            "shape": self.shape.model_dump(exclude_none=True),
            "settings": self.settings.model_dump(),
            "texts": len(self.texts),
            "domains": sorted({text.domain for text in self.texts}),
            "tokens": self.state.tokens,
            "seconds": round(self.state.seconds, 2),
            "held_out": quality.row(),
        }
        kept = {"shape": recipe["shape"]}
        save_drafter(self.folder, self.learner.trainee.kind, kept, self.verifier.info, self.weights, recipe)
        (self.folder / "curve.csv").write_text(curve_csv(self.state.curve), encoding="utf-8")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.learner.rest()
        return Trained(self.student, quality, self.state.curve, self.state.seconds)

    def resume(self) -> None:
        """Go back to the last checkpoint, if there is one; `CalibrationError` where it is of another training."""
        path = self.partial / "checkpoint.pt"
        if not path.is_file():
            return
        kept = torch.load(path, map_location=self.verifier.device, weights_only=True)
        mine = self._identity()
        for key in mine:
            if kept["identity"].get(key) != mine[key]:
                rule = f"holds a training with {key} = {kept['identity'].get(key)!r}"
                raise CalibrationError(f"{self.partial}: {rule}, got {mine[key]!r}; choose another folder")
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(kept["weights"][name])
        self.learner.optimiser.load_state_dict(kept["optimiser"])
        self.state = Progression(**kept["state"])

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
        (self.partial / "curve.csv").write_text(curve_csv(self.state.curve), encoding="utf-8")

    def _identity(self) -> dict[str, Any]:
        return {
            "verifier": self.verifier.info.name,
            "shape": self.shape.model_dump(),
            "settings": self.settings.model_dump(),
            "texts": [len(self.texts), len(self.held_out)],
        }

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

    def _measure(self) -> None:
        """Add a row to the learning curve."""
        state = self.state
        quality = evaluate(self.student, self.verifier, self.held_out, self.decoding)
        loss = state.loss_sum / state.loss_count if state.loss_count else float("nan")
        numbers = [state.tokens, round(state.seconds, 2), round(loss, 5), *quality.row().values()]
        state.curve.append(dict(zip(CURVE, numbers, strict=True)))
        state.loss_sum, state.loss_count = 0.0, 0


def curve_csv(curve: Sequence[dict[str, float]]) -> str:
    """Write a learning curve as CSV; a loss that is not known yet is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CURVE, lineterminator="\n")
    writer.writeheader()
    for row in curve:
        writer.writerow({name: "" if value != value else value for name, value in row.items()})
    return text.getvalue()


def _quality(row: dict[str, float]) -> Quality:
    return Quality(row["match"], row["overlap"], row["tokens_per_round"], int(row["held_out_tokens"]))


def _passes(before: int, after: int, every: int) -> bool:
    return before // every != after // every
