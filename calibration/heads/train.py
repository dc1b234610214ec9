"""Train a head on the verifier's text from the stored states: resumable, with a learning curve on held-out text.

Every start drafts along the text's own tokens, `HeadShape.tokens` deep. The loss of draft j is a divergence between
the verifier's distribution at that position and the head's, both through the verifier's LM head, weighted with
``depth_decay`` ** (j - 1), plus ``regression`` times the smooth L1 distance of its features to the verifier's state.
At depth 1 this is how EAGLE-1 is trained (Li et al. 2024); deeper drafts go on from the head's own features, as they
will when it drafts (the training-time test of EAGLE-3). Medusa heads are trained against the verifier's distribution
rather than the text's tokens (self-distillation; Cai et al. 2024).
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calibration.distill.batches import steps
from calibration.distill.corpus import Text
from calibration.distill.divergences import divergence
from calibration.distill.loss_head import LossHead
from calibration.distill.train import Progression
from calibration.drafters.folder import save_drafter
from calibration.errors import CalibrationError
from calibration.fetch import Progress
from calibration.heads.batches import PairBatch, PairReader
from calibration.heads.evaluate import HeadQuality, evaluate_head
from calibration.heads.networks import fresh_head
from calibration.heads.settings import HeadSettings
from calibration.heads.shape import HeadKind, HeadShape
from calibration.models import Verifier
from calibration.sampling import generator_for
from calibration.traces.manifest import DecodingInfo

LOSS_POSITIONS = 256
"""Drafts whose distributions are held at once; their gradient is taken before the next ones."""


@dataclass(frozen=True)
class TrainedHead:
    """A trained head: the network, its final quality on the held-out text, and its learning curve."""

    head: Any
    quality: HeadQuality
    curve: list[dict[str, float]]
    seconds: float


def train_head(
    kind: HeadKind,
    verifier: Verifier,
    shape: HeadShape,
    texts: Sequence[Text],
    held_out: Sequence[Text],
    decoding: DecodingInfo,
    settings: HeadSettings,
    folder: Path | str,
    progress: Progress | None = None,
) -> TrainedHead:
    """Train a head of `kind` for ``settings.tokens`` output tokens; write it to `folder` with ``curve.csv``.

    An interrupted call goes on from its last checkpoint, and gives what an uninterrupted one gives. `decoding` says
    how `held_out` was written. `CalibrationError` where `folder` or its checkpoint belongs to something else.
    """
    run = HeadTraining(kind, verifier, shape, texts, held_out, decoding, settings, Path(folder))
    run.resume()
    run.go(progress)
    return run.finish()


class HeadTraining:
    """One training: head, optimiser, progression, and its checkpoint on disk."""

    def __init__(
        self,
        kind: HeadKind,
        verifier: Verifier,
        shape: HeadShape,
        texts: Sequence[Text],
        held_out: Sequence[Text],
        decoding: DecodingInfo,
        settings: HeadSettings,
        folder: Path,
    ) -> None:
        usable = [text for text in texts if len(text.output_ids) > 1]
        if not usable or not held_out:
            raise CalibrationError("training: must have texts to learn from and held-out ones, got none")
        self.kind, self.verifier, self.settings, self.folder = kind, verifier, settings, folder
        self.texts, self.held_out, self.decoding = usable, held_out, decoding
        self.shape = shape.for_verifier(kind, verifier)
        self.partial = folder.with_name(folder.name + ".partial")
        self.head = fresh_head(kind, self.shape, verifier.model, generator_for(verifier.device, settings.seed))
        self.weights = dict(self.head.named_parameters())
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [w for w in self.weights.values() if w.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [w for w in self.weights.values() if w.ndim <= 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        )
        self.state = Progression()
        self.reader = PairReader(verifier.model, prompts=settings.prompt_states and kind != "medusa")
        self._divergence = divergence(settings.divergence, settings.jsd_beta)
        # NOTE: cast once here; autocast would do it anew for every batch (5 % of a step).
        dtype = torch.bfloat16 if settings.bfloat16 else torch.float32
        self._loss_head = LossHead(verifier.model.get_output_embeddings(), usable, settings, dtype)

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
            texts = [self.texts[i] for i in rows]
            loss = self._step(texts, step)
            state.step, state.tokens = step + 1, before + sum(len(text.output_ids) for text in texts)
            state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
            state.seconds += time.perf_counter() - begin
            if state.tokens >= settings.tokens or _passes(before, state.tokens, settings.curve_tokens):
                self._measure()
            if _passes(before, state.tokens, settings.checkpoint_tokens):
                self._save()
        if progress:
            progress(f"train {self.folder.name}", settings.tokens, settings.tokens)

    def finish(self) -> TrainedHead:
        """Write the head and its curve; take the checkpoint away."""
        recipe = {
            "settings": self.settings.model_dump(),
            "texts": len(self.texts),
            "domains": sorted({text.domain for text in self.texts}),
            "tokens": self.state.tokens,
            "seconds": round(self.state.seconds, 2),
            "held_out": {key: value for key, value in self.state.curve[-1].items() if key not in _PROGRESS},
        }
        save_drafter(self.folder, self.kind, self.shape.model_dump(), self.verifier.info, self.weights, recipe)
        (self.folder / "curve.csv").write_text(curve_csv(self.state.curve), encoding="utf-8")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.head.requires_grad_(False)
        return TrainedHead(self.head, self._quality(), self.state.curve, self.state.seconds)

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
        self.optimiser.load_state_dict(kept["optimiser"])
        self.state = Progression(**kept["state"])

    def _save(self) -> None:
        """Write a checkpoint; the older one stays until the new one is whole."""
        self.partial.mkdir(parents=True, exist_ok=True)
        scratch = self.partial / ".checkpoint.tmp"
        kept = {
            "identity": self._identity(),
            "weights": {name: tensor.detach() for name, tensor in self.weights.items()},
            "optimiser": self.optimiser.state_dict(),
            "state": dataclasses.asdict(self.state),
        }
        torch.save(kept, scratch)
        os.replace(scratch, self.partial / "checkpoint.pt")
        (self.partial / "curve.csv").write_text(curve_csv(self.state.curve), encoding="utf-8")

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "verifier": self.verifier.info.name,
            "shape": self.shape.model_dump(),
            "settings": self.settings.model_dump(),
            "texts": [len(self.texts), len(self.held_out)],
        }

    def _step(self, texts: Sequence[Text], step: int) -> float:
        """Take one optimiser step; give the mean loss per draft."""
        share = self.settings.rate(self.state.tokens)
        for group in self.optimiser.param_groups:
            group["lr"] = share * self.settings.learning_rate
        self.optimiser.zero_grad(set_to_none=True)
        generator = generator_for(torch.device("cpu"), self.settings.seed, step)
        with self._precision():
            batch = self.reader.batch(texts, torch.float32)
            drafts = self._drafts(batch, generator)
        self._loss_head.draw(generator_for(self.verifier.device, self.settings.seed, step, 1))
        loss, gradient = self._loss(drafts)
        torch.autograd.backward(drafts.features, gradient)
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.settings.clip)
        self.optimiser.step()
        return loss

    def _drafts(self, batch: PairBatch, generator: torch.Generator) -> _TrainingDrafts:
        """Draft along the text from some starts of every row."""
        last, mine = self._starts(batch, generator)
        embed = self.verifier.model.get_input_embeddings()
        targets = [batch.targets(last, step) for step in range(self.shape.tokens)]
        features = batch.features
        if self.settings.noise:
            size = features[batch.real].square().mean().sqrt() * self.settings.noise
            drawn = torch.rand(features.shape, generator=generator).to(features.device)
            features = features + (2 * drawn - 1) * size
        past = self.head.read(None, features, embed(batch.tokens).float(), batch.real)
        found = self.head.unroll(
            past, past.branches(last), self.shape.tokens, lambda step, _: embed(targets[step][1]).float()
        )
        known = torch.stack([mine & target[2] for target in targets], 2)
        weight = self.settings.depth_decay ** torch.arange(self.shape.tokens, device=known.device)
        return _TrainingDrafts(
            features=torch.stack(found, 2)[known].float(),
            states=torch.stack([target[0] for target in targets], 2)[known],
            weight=(weight / weight.mean()).expand(known.shape)[known],
        )

    def _starts(self, batch: PairBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the last pairs [rows, S] of the starts to draft from, and say which of them are real."""
        possible = batch.starts()
        most = int(possible.sum(1).max())
        count = most if self.settings.starts is None else min(self.settings.starts, most)
        luck = torch.rand(possible.shape, generator=generator).to(possible.device)
        last = torch.where(possible, luck, -1.0).topk(count, dim=1).indices
        return last, possible.gather(1, last)

    def _loss(self, drafts: _TrainingDrafts) -> tuple[float, Tensor]:
        """Give the mean loss and its gradient by the features [n, hidden size].

        NOTE: a few drafts at a time, so that the distributions stay in the cache and memory does not grow with the
        batch.
        """
        weight = self.settings.regression
        regression = (1.0 if self.kind == "eagle" else 0.0) if weight is None else weight
        gradient = torch.empty_like(drafts.features)
        total, count = 0.0, len(drafts.features)
        for begin in range(0, count, LOSS_POSITIONS):
            mine = slice(begin, begin + LOSS_POSITIONS)
            features = drafts.features[mine].detach().requires_grad_(True)
            states = drafts.states[mine]
            each = self._divergence(self._loss_head.logits(states), self._loss_head.logits(features))
            if regression:
                each = each + regression * functional.smooth_l1_loss(features, states, reduction="none").mean(-1)
            loss = (drafts.weight[mine] * each).sum() / count
            (gradient[mine],) = torch.autograd.grad(loss, features)
            total += float(loss.detach())
        return total, gradient

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.autocast(self.verifier.device.type, dtype=torch.bfloat16, enabled=self.settings.bfloat16):
            yield

    def _measure(self) -> None:
        """Add a row to the learning curve."""
        state = self.state
        with self._precision():
            quality = evaluate_head(
                self.head, self.verifier.model, self.reader, self.held_out, self.decoding, torch.float32
            )
        loss = state.loss_sum / state.loss_count if state.loss_count else float("nan")
        progress = dict(zip(_PROGRESS, (state.tokens, round(state.seconds, 2), round(loss, 5)), strict=True))
        state.curve.append({**progress, **quality.row()})
        state.loss_sum, state.loss_count = 0.0, 0

    def _quality(self) -> HeadQuality:
        row = self.state.curve[-1]
        match = tuple(row[f"match_{depth}"] for depth in range(1, self.shape.tokens + 1))
        return HeadQuality(match, row["tokens_per_round"], int(row["held_out_tokens"]))


@dataclass(frozen=True)
class _TrainingDrafts:
    """n drafts: features [n, hidden size], the verifier's states that they should lead to, and their weights [n]."""

    features: Tensor
    states: Tensor
    weight: Tensor


_PROGRESS = ("tokens", "seconds", "loss")


def curve_csv(curve: Sequence[dict[str, float]]) -> str:
    """Write a learning curve as CSV; a loss that is not known yet is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, curve[0].keys(), lineterminator="\n")
    writer.writeheader()
    for row in curve:
        writer.writerow({name: "" if value != value else value for name, value in row.items()})
    return text.getvalue()


def _passes(before: int, after: int, every: int) -> bool:
    return before // every != after // every
