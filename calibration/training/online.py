"""Online distillation: a drafter that goes on learning from the requests it serves, against the same one frozen.

The drafter keeps a buffer of (context, verifier's state) at positions where the verifier rejected its draft, and
takes a few distillation steps on it every so many requests. Under a domain shift its acceptance falls, then recovers.

Source: Liu and others, "Online Speculative Decoding" (2024). Which positions are rejected is drawn as a live loop
with drafts of `GAMMA` tokens would have it, given the text: exact in distribution.

A training to a budget of tokens: resumable, with a learning curve on held-out text.

Checkpoints, the curve and the finished drafter lie in ``<folder>.partial`` until the folder itself appears.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import shutil
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.common.files import check_identity, whole_file
from calibration.common.progress import StageProgress
from calibration.models.load import Verifier
from calibration.traces.manifest import DecodingInfo
from calibration.trained.corpus import Batch, Text, collate, steps
from calibration.trained.evaluate import GAMMA, positions
from calibration.trained.folder import save_drafter
from calibration.trained.shapes import TrainSettings
from calibration.trained.trainees import load_trained, resume_trainee
from calibration.training.jobfile import OnlineTable
from calibration.training.learner import Descent, Learner, training_dtype

STEP_TEXTS = 8
"""Requests whose rejected positions one step learns from."""


@dataclass(frozen=True)
class Served:
    """One request: the mean acceptance probability of the frozen and of the learning drafter over its text.

    ``steps``: learning steps taken before it, in all.
    """

    request: int
    phase: int
    domain: str
    frozen: float
    online: float
    steps: int


@dataclass(frozen=True)
class Shift:
    """What a domain shift did: mean acceptance in the last third before it, and the first and last third after it.

    ``drift`` = first - before and ``recovery`` = last - first of the learning drafter; ``frozen_first`` and
    ``frozen_last`` say what the new text alone would have made of them.
    """

    before_domain: str
    after_domain: str
    before: float
    first: float
    last: float
    frozen_before: float
    frozen_first: float
    frozen_last: float
    drift: float
    recovery: float


def serve(
    verifier: Verifier,
    folder: Path | str,
    stream: Sequence[tuple[int, Text]],
    decoding: DecodingInfo,
    settings: OnlineTable,
    training: TrainSettings,
    progress: StageProgress | None = None,
) -> list[Served]:
    """Let the trained drafter in `folder` serve `stream`, (phase, text) by request, once frozen and once learning.

    `training` says by which divergence it learns, and how exactly. A request is measured before it is learnt from.
    """
    frozen, _ = load_trained(folder, verifier)
    trainee = resume_trainee(folder, verifier, training_dtype(verifier))
    learner = Learner(verifier, trainee, [text for _, text in stream], training)
    buffer = Buffer(settings.buffer)
    rng = np.random.default_rng(settings.seed)
    served, steps = [], 0
    for number, (phase, text) in enumerate(stream):
        if progress:
            progress("serve online", number, len(stream))
        batch = collate([text], verifier.device)
        accept = positions(trainee.model, verifier, batch, decoding)[2]
        still = positions(frozen, verifier, batch, decoding)[2]
        served.append(Served(number, phase, text.domain, float(still.mean()), float(accept.mean()), steps))
        buffer.add(text, rejected(accept, GAMMA, rng))
        if (number + 1) % settings.interval == 0 and len(buffer):
            for _ in range(settings.steps):
                batch = buffer.draw(STEP_TEXTS, rng, verifier.device)
                learner.step(batch, settings.learning_rate, settings.seed, steps)
                steps += 1
    learner.rest()
    if progress:
        progress("serve online", len(stream), len(stream))
    return served


def rejected(accept: NDArray[np.float64], gamma: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the output positions at which a live loop with drafts of `gamma` tokens rejects one.

    ``accept`` [T]: acceptance probability of each position given the text, which starts with round 1 at position 1.
    """
    luck = rng.random(len(accept))
    found, t = [], 1
    while t < len(accept):
        end = min(t + gamma, len(accept))
        refused = np.flatnonzero(luck[t:end] >= accept[t:end])
        if len(refused):
            found.append(t + int(refused[0]))
            t = found[-1] + 1
        else:
            t += gamma + 1
    return np.array(found, dtype=np.int64)


class Buffer:
    """The rejected positions of the last requests, `capacity` of them at most; the oldest requests leave first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: deque[tuple[Text, NDArray[np.int64]]] = deque()

    def __len__(self) -> int:
        """Count the positions kept."""
        return sum(len(where) for _, where in self._kept)

    def add(self, text: Text, where: NDArray[np.int64]) -> None:
        """Keep the output positions `where` of `text`; of a request that alone is too long, the last ones."""
        if len(where):
            self._kept.append((text, where[-self._capacity :]))
        while len(self) > self._capacity:
            self._kept.popleft()

    def draw(self, texts: int, rng: np.random.Generator, device: torch.device) -> Batch:
        """Draw up to `texts` requests without replacement; give a batch of their kept positions alone."""
        chosen = rng.permutation(len(self._kept))[:texts].tolist()
        rows = [self._kept[index] for index in chosen]
        batch = collate([text for text, _ in rows], device)
        begins = np.cumsum([0, *(len(text.output_ids) for text, _ in rows)])
        where = np.concatenate([begin + mine for begin, (_, mine) in zip(begins, rows, strict=False)])
        keep = torch.as_tensor(where, device=device)
        return Batch(batch.tokens, batch.places[keep], batch.targets[keep], batch.states[keep])


def shifts(served: Sequence[Served]) -> list[Shift]:
    """Give what every change of phase did."""
    phases = [list(group) for _, group in itertools.groupby(served, key=lambda row: row.phase)]
    found = []
    for old, new in itertools.pairwise(phases):
        third_old, third_new = max(1, len(old) // 3), max(1, len(new) // 3)
        parts = (old[-third_old:], new[:third_new], new[-third_new:])
        before, first, last = (float(np.mean([row.online for row in part])) for part in parts)
        still = [float(np.mean([row.frozen for row in part])) for part in parts]
        names = (old[0].domain, new[0].domain)
        found.append(Shift(*names, before, first, last, still[0], still[1], still[2], first - before, last - first))
    return found


def make_stream(texts: Mapping[str, Sequence[Text]], settings: OnlineTable) -> list[tuple[int, Text]]:
    """Give the requests of all phases; every text of a domain is used once, in its order."""
    needed = {domain: settings.domains.count(domain) * settings.requests for domain in settings.domains}
    for domain, count in needed.items():
        if len(texts.get(domain, ())) < count:
            rule = f"must have {count} texts of {domain} for its phases"
            raise CalibrationError(f"online: {rule}, got {len(texts.get(domain, ()))}")
    left = {domain: iter(texts[domain]) for domain in needed}
    return [
        (phase, next(left[domain])) for phase, domain in enumerate(settings.domains) for _ in range(settings.requests)
    ]


def online_csv(rows: Sequence[Served] | Sequence[Shift]) -> str:
    """Write a table of `Served` or of `Shift` as CSV, numbers rounded to 5 decimals."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0])] if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row)
        writer.writerow({name: round(v, 5) if isinstance(v, float) else v for name, v in values.items()})
    return text.getvalue()


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
        kept = {
            "identity": self._identity(),
            "weights": {name: tensor.detach() for name, tensor in self.weights.items()},
            "optimiser": self.learner.optimiser.state_dict(),
            "state": dataclasses.asdict(self.state),
        }
        with whole_file(self.partial / "checkpoint.pt") as scratch:
            torch.save(kept, scratch)
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
