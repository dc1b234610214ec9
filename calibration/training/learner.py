"""One optimiser step: the divergence of a drafter from the verifier at given positions, and AdamW."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from calibration.models.load import Verifier
from calibration.models.sampling import generator_for
from calibration.trained.batches import Batch
from calibration.trained.corpus import Text
from calibration.trained.settings import TrainSettings
from calibration.trained.trainees import Trainee
from calibration.training.divergences import divergence
from calibration.training.loss_head import LossHead

LOSS_POSITIONS = 256
"""Positions whose distributions are held at once; their gradient is taken before the next ones."""


def training_dtype(verifier: Verifier) -> torch.dtype:
    """Give the dtype of trained weights: float32, or float64 beside a verifier that has it."""
    return torch.float64 if verifier.model.dtype == torch.float64 else torch.float32


class Descent:
    """Weights that descend a divergence from the verifier: AdamW, and the head that the loss looks through.

    `dtype` is that of `weights`; `texts` are those whose frequent tokens a cut loss keeps.
    """

    def __init__(
        self,
        verifier: Verifier,
        weights: dict[str, Tensor],
        dtype: torch.dtype,
        texts: Sequence[Text],
        settings: TrainSettings,
    ) -> None:
        self.verifier, self.weights, self.settings = verifier, weights, settings
        self._mixed = settings.bfloat16 and dtype == torch.float32
        for tensor in weights.values():
            tensor.requires_grad_(True)
        matrices = [w for w in weights.values() if w.ndim > 1]
        vectors = [w for w in weights.values() if w.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        )
        self._divergence = divergence(settings.divergence, settings.jsd_beta)
        # NOTE: cast once here; autocast would do it anew for every batch (5 % of a step).
        self._head = LossHead(
            verifier.model.get_output_embeddings(), texts, settings, torch.bfloat16 if self._mixed else dtype
        )

    def begin(self, rate: float, *seed: int) -> None:
        """Begin a step at the learning rate `rate`; `seed` is that of the sample of rare tokens."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        self._head.draw(generator_for(self.verifier.device, *seed, 1))

    def end(self) -> None:
        """End a step: clip the gradients that have come together, and move the weights."""
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.settings.clip)
        self.optimiser.step()

    def divergences(self, hidden: Tensor, states: Tensor) -> Tensor:
        """Give the divergence [n] of what `hidden` [n, hidden size] predicts from what the verifier's `states` do."""
        return self._divergence(self._head.logits(states), self._head.logits(hidden))

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Compute matrix products in bfloat16 for a while, where the settings say so."""
        with torch.autocast(self.verifier.device.type, dtype=torch.bfloat16, enabled=self._mixed):
            yield

    def rest(self) -> None:
        """End the training: the weights take no gradient any more."""
        for tensor in self.weights.values():
            tensor.requires_grad_(False)


class Learner(Descent):
    """A student in training, and its optimiser."""

    def __init__(self, verifier: Verifier, trainee: Trainee, texts: Sequence[Text], settings: TrainSettings) -> None:
        super().__init__(verifier, trainee.weights, training_dtype(verifier), texts, settings)
        self.trainee = trainee

    def step(self, batch: Batch, rate: float, *seed: int) -> float:
        """Take one step at the learning rate `rate`; give the mean divergence per position, of the last exit.

        `seed` is that of the sample of rare tokens.
        """
        self.trainee.model.train()
        self.begin(rate, *seed)
        with self.precision():
            exits = self.trainee.states(batch)
        found = [self.loss(hidden.detach(), batch.states) for hidden in exits]
        torch.autograd.backward(exits, [gradient for _, gradient in found])
        self.end()
        self.trainee.model.eval()
        return found[-1][0]

    def loss(self, hidden: Tensor, states: Tensor) -> tuple[float, Tensor]:
        """Give the mean divergence and its gradient by `hidden` [n, hidden size]; `states` are the verifier's."""
        return piecewise(
            lambda mine, part: self.divergences(part, states[mine].to(part.dtype)).sum() / len(hidden), hidden
        )


def piecewise(loss: Callable[[slice, Tensor], Tensor], hidden: Tensor) -> tuple[float, Tensor]:
    """Add up ``loss(places, hidden[places])`` over all places; give the sum and its gradient by `hidden` [n, ...].

    NOTE: a few positions at a time, so that the distributions stay in the cache and memory does not grow with the
    batch.
    """
    gradient = torch.empty_like(hidden)
    total = 0.0
    for begin in range(0, len(hidden), LOSS_POSITIONS):
        mine = slice(begin, begin + LOSS_POSITIONS)
        part = hidden[mine].detach().requires_grad_(True)
        found = loss(mine, part)
        (gradient[mine],) = torch.autograd.grad(found, part)
        total += float(found.detach())
    return total, gradient
