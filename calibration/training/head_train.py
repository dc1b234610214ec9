"""Train a head on the verifier's text from the stored states: resumable, with a learning curve on held-out text.

Every start drafts along the text's own tokens, `HeadShape.tokens` deep. The loss of draft j is a divergence between
the verifier's distribution at that position and the head's, both through the verifier's LM head, weighted with
``depth_decay`` ** (j - 1), plus ``regression`` times the smooth L1 distance of its features to the verifier's state.
At depth 1 this is how EAGLE-1 is trained (Li et al. 2024); deeper drafts go on from the head's own features, as they
will when it drafts (the training-time test of EAGLE-3). Medusa heads are trained against the verifier's distribution
rather than the text's tokens (self-distillation; Cai et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calibration.common.progress import StageProgress
from calibration.models.load import Verifier
from calibration.models.sampling import generator_for
from calibration.traces.manifest import DecodingInfo
from calibration.trained.corpus import Text
from calibration.trained.head_networks import fresh_head
from calibration.trained.head_settings import HeadSettings
from calibration.trained.head_shape import HeadKind, HeadShape
from calibration.training.head_batches import PairBatch, PairReader
from calibration.training.head_evaluate import HeadQuality, evaluate_head
from calibration.training.learner import Descent, piecewise
from calibration.training.resumable import ResumableTraining


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
    progress: StageProgress | None = None,
) -> TrainedHead:
    """Train a head of `kind` for ``settings.tokens`` output tokens; write it to `folder` with ``curve.csv``.

    An interrupted call goes on from its last checkpoint, and gives what an uninterrupted one gives. `decoding` says
    how `held_out` was written. `CalibrationError` where `folder` or its checkpoint belongs to something else.
    """
    run = HeadTraining(kind, verifier, shape, texts, held_out, decoding, settings, Path(folder))
    run.resume()
    run.go(progress)
    return run.finish()


class HeadTraining(ResumableTraining):
    """The training of one head."""

    shape: HeadShape
    settings: HeadSettings

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
        super().__init__(verifier, shape.for_verifier(kind, verifier), usable, held_out, decoding, settings, folder)
        self.kind = kind
        self.head = fresh_head(kind, self.shape, verifier.model, generator_for(verifier.device, settings.seed))
        self.learner = Descent(verifier, dict(self.head.named_parameters()), torch.float32, usable, settings)
        self.reader = PairReader(verifier.model, prompts=settings.prompt_states and kind != "medusa")

    def finish(self) -> TrainedHead:
        """Write the head and its curve; take the checkpoint away."""
        row = self._write(self.kind, self.shape.model_dump(), {})
        match = tuple(row[f"match_{depth}"] for depth in range(1, self.shape.tokens + 1))
        quality = HeadQuality(match, row["tokens_per_round"], row["held_out_tokens"])
        return TrainedHead(self.head, quality, self.state.curve, self.state.seconds)

    def _identity(self) -> dict[str, Any]:
        return {"kind": self.kind, **super()._identity()}

    def _learn(self, texts: Sequence[Text], step: int, rate: float) -> tuple[float, int]:
        seed = self.settings.seed
        self.learner.begin(rate, seed, step)
        with self.learner.precision():
            batch = self.reader.batch(texts, torch.float32)
            drafts = self._drafts(batch, generator_for(torch.device("cpu"), seed, step))
        loss, gradient = self._loss(drafts)
        torch.autograd.backward(drafts.features, gradient)
        self.learner.end()
        return loss, sum(len(text.output_ids) for text in texts)

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
        """Give the mean loss and its gradient by the features [n, hidden size]."""
        weight = self.settings.regression
        regression = (1.0 if self.kind == "eagle" else 0.0) if weight is None else weight

        def loss(mine: slice, features: Tensor) -> Tensor:
            states = drafts.states[mine]
            each = self.learner.divergences(features, states)
            if regression:
                each = each + regression * functional.smooth_l1_loss(features, states, reduction="none").mean(-1)
            return (drafts.weight[mine] * each).sum() / len(drafts.features)

        return piecewise(loss, drafts.features)

    def _quality_row(self) -> Mapping[str, float]:
        with self.learner.precision():
            model, dtype = self.verifier.model, torch.float32
            return evaluate_head(self.head, model, self.reader, self.held_out, self.decoding, dtype).row()


@dataclass(frozen=True)
class _TrainingDrafts:
    """n drafts: features [n, hidden size], the verifier's states that they should lead to, and their weights [n]."""

    features: Tensor
    states: Tensor
    weight: Tensor
