"""Train a head on the verifier's text from the stored states: resumable, with a learning curve on held-out text.

Every start drafts along the text's own tokens, `HeadShape.tokens` deep. The loss of draft j is a divergence between
the verifier's distribution at that position and the head's, both through the verifier's LM head, weighted with
``depth_decay`` ** (j - 1), plus ``regression`` times the smooth L1 distance of its features to the verifier's state.
At depth 1 this is how EAGLE-1 is trained (Li et al. 2024); deeper drafts go on from the head's own features, as they
will when it drafts (the training-time test of EAGLE-3). Medusa heads are trained against the verifier's distribution
rather than the text's tokens (self-distillation; Cai et al. 2024).

Training batches of pairs (state, next token), from stored states.

How well a head drafts on held-out text, by depth, from the stored states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from calibration.common.progress import StageProgress
from calibration.models.lane import Lane, pad_left
from calibration.models.load import Verifier
from calibration.models.sampling import generator_for, processed
from calibration.traces.manifest import DecodingInfo
from calibration.trained.corpus import Text
from calibration.trained.evaluate import expected_rounds
from calibration.trained.heads import Head, fresh_head
from calibration.trained.shapes import HeadKind, HeadSettings, HeadShape
from calibration.training.learner import Descent, piecewise
from calibration.training.online import ResumableTraining


@dataclass(frozen=True)
class PairBatch:
    """Texts side by side, flush left: pair i of a row is (f_i, x_{i+1}).

    ``features`` [rows, M, hidden size], ``tokens`` and ``real`` [rows, M]. ``first`` [rows]: the pair from which the
    first output token with a stored state behind it is drafted. Draft j from pair a stands for token a + 1 + j, which
    the verifier predicted by f_{a+j}.
    """

    features: Tensor
    tokens: Tensor
    real: Tensor
    first: Tensor

    def starts(self) -> Tensor:
        """Say from which pairs at least one draft can be compared [rows, M]."""
        column = torch.arange(self.real.shape[1], device=self.real.device)
        return (column >= self.first[:, None]) & (column + 1 < self.real.sum(1)[:, None])

    def targets(self, last: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Give, for draft `step` (from 0) from the pairs `last` [rows, S]: state, token, and where they are known.

        The state [rows, S, hidden size] is the verifier's that predicted the token [rows, S].
        """
        at = last + step + 1
        known = at < self.real.sum(1)[:, None]
        at = torch.where(known, at, 0)
        state = self.features.gather(1, at[..., None].expand(-1, -1, self.features.shape[-1]))
        return state, self.tokens.gather(1, at), known


class PairReader:
    """Lays texts side by side; with `prompts`, the verifier reads each prompt once, for its states."""

    def __init__(self, verifier: Any, *, prompts: bool) -> None:
        self._verifier, self._prompts = verifier, prompts
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def batch(self, texts: Sequence[Text], dtype: torch.dtype) -> PairBatch:
        """Give the pairs of `texts` in `dtype`."""
        device = self._verifier.device
        before = self._prompt_states([text.prompt_ids for text in texts])
        counts = [len(prompt) + len(text.states) for prompt, text in zip(before, texts, strict=True)]
        features = torch.zeros(len(texts), max(counts), before[0].shape[1], dtype=torch.float16)
        tokens = torch.zeros(len(texts), max(counts), dtype=torch.long)
        real = torch.zeros(len(texts), max(counts), dtype=torch.bool)
        for row, (prompt, text, count) in enumerate(zip(before, texts, counts, strict=True)):
            features[row, : len(prompt)] = prompt
            features[row, len(prompt) : count] = torch.from_numpy(np.array(text.states))
            tokens[row, :count] = torch.as_tensor((*text.prompt_ids, *text.output_ids)[-count:])
            real[row, :count] = True
        first = torch.tensor([max(0, len(prompt) - 1) for prompt in before])
        return PairBatch(features.to(device, dtype), tokens.to(device), real.to(device), first.to(device))

    @torch.no_grad()
    def _prompt_states(self, prompts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Give f_0 .. f_{P-2} of each prompt in float16; the state after its last token is the output's first."""
        if not self._prompts:
            size = self._verifier.config.hidden_size
            return [torch.zeros(0, size, dtype=torch.float16)] * len(prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if new:
            lane = Lane(self._verifier, len(new), taps=("norm",))
            tokens, real = pad_left(new, self._verifier.device)
            lane.feed(tokens, real, last=1)
            for prompt, states, mine in zip(new, lane.tapped["norm"], real, strict=True):
                self._kept[prompt] = states[mine][:-1].to("cpu", torch.float16)
        return [self._kept[prompt] for prompt in prompts]


@dataclass(frozen=True)
class HeadQuality:
    """A head on held-out text of `tokens` output tokens, going on from the text's own tokens.

    ``match`` [depth]: share of the starts at which the draft of that depth has the verifier's largest logit.
    ``tokens_per_round``: tokens emitted per round of as many drafts as the head is trained for, the verifier's own
    token included; the expectation over the acceptance given the text, exact for the decoding by which the text was
    written.
    """

    match: tuple[float, ...]
    tokens_per_round: float
    tokens: int

    def row(self) -> dict[str, float]:
        """Give the numbers by name, rounded to 5 decimals."""
        by_depth = {f"match_{depth}": round(value, 5) for depth, value in enumerate(self.match, 1)}
        return {**by_depth, "tokens_per_round": round(self.tokens_per_round, 5), "held_out_tokens": self.tokens}


@torch.inference_mode()
def evaluate_head(
    head: Head, verifier: Any, reader: PairReader, texts: Sequence[Text], decoding: DecodingInfo, dtype: torch.dtype
) -> HeadQuality:
    """Measure `head` on `texts`, which the model `verifier` wrote by `decoding`; the whole vocabulary counts."""
    matches, rounds, emitted = [], 0.0, 0
    for text in texts:
        if len(text.output_ids) < 2:
            continue
        match, accept = _measured(head, verifier, reader.batch([text], dtype), decoding)
        matches.append(match)
        rounds += expected_rounds(accept)
        emitted += len(accept)
    by_depth = np.nanmean(np.concatenate(matches), axis=0)
    per_round = emitted / rounds if rounds else 0.0
    return HeadQuality(tuple(by_depth.tolist()), per_round, sum(len(text.output_ids) for text in texts))


def _measured(
    head: Head, verifier: Any, batch: PairBatch, decoding: DecodingInfo
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give match and acceptance probability [T, depth] from every start of one text; NaN behind its end."""
    logits, embed = verifier.get_output_embeddings(), verifier.get_input_embeddings()
    last = batch.starts().nonzero()[:, 1]
    count, place = len(last), last[0] + 1
    token = batch.tokens[0, place:]
    p_logits = logits(batch.features[0, place:].to(logits.weight.dtype))
    own, p = p_logits.argmax(-1), _mass(p_logits, token, decoding)
    match, accept = (np.full((count, head.shape.tokens), np.nan) for _ in range(2))

    def follow(step: int, features: Tensor) -> Tensor:
        left = count - step  # drafts of this depth whose token lies in the text
        if left > 0:
            q_logits = logits(features[0, :left].to(logits.weight.dtype))
            same = (q_logits.argmax(-1) == own[step:]).double()
            ratio = _mass(q_logits, token[step:], decoding) / p[step:].clamp(min=1e-30)
            match[:left, step] = same.cpu().numpy()
            accept[:left, step] = (same if decoding.mode == "greedy" else ratio.clamp(max=1.0)).cpu().numpy()
        embedded: Tensor = embed(token[(torch.arange(count, device=token.device) + step).clamp(max=count - 1)])
        return embedded[None].to(features.dtype)

    past = head.read(None, batch.features, embed(batch.tokens).to(batch.features.dtype), batch.real)
    head.unroll(past, past.branches(last[None]), head.shape.tokens, follow)
    return match, accept


def _mass(logits: Tensor, token: Tensor, decoding: DecodingInfo) -> Tensor:
    """Give the probability of `token` [n] in the processed distributions."""
    return processed(logits, decoding).gather(-1, token[:, None])[:, 0]


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
    run = HeadTraining(
        kind=kind,
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
