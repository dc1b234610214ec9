"""One optimiser step: the divergence of a drafter from the verifier at given positions, and AdamW.

Divergences between the verifier's p and a student's q, per position, from logits; pure functions of torch.

    fkl      KL(p || q) = sum p (log p - log q)                       forward: q must cover p
    rkl      KL(q || p)                                               reverse: q may leave parts of p out
    jsd      beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    tvd      1/2 sum |p - q| = 1 - sum min(p, q)                      1 - acceptance of speculative sampling
    tvd++    the policy-gradient form of tvd with normalised rewards

Sources: for the first four Zhou and others, "DistillSpec: Improving Speculative Decoding via Knowledge Distillation"
(2024); for tvd++ Goel and others, "Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned
LLMs" (2024). Logits are [..., vocabulary], float; a divergence is [...]. Gradients flow into q only.

The head through which a loss sees both models: the whole vocabulary, or its frequent part and a sample.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.models.load import Verifier
from calibration.models.sampling import generator_for
from calibration.trained.corpus import Batch, Text, frequent_tokens
from calibration.trained.shapes import DivergenceName, TrainSettings
from calibration.trained.trainees import Trainee

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(verifier's logits, student's logits) [..., vocabulary] -> [...]."""


def forward_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Give KL(p || q) in nats."""
    p = p_logits.detach().log_softmax(-1)
    return (p.exp() * (p - q_logits.log_softmax(-1))).sum(-1)


def reverse_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Give KL(q || p) in nats."""
    p, q = p_logits.detach().log_softmax(-1), q_logits.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def jensen_shannon(p_logits: Tensor, q_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Give the generalised Jensen-Shannon divergence with weight `beta` on p, 0 < beta < 1, in nats."""
    if not 0 < beta < 1:
        raise CalibrationError(f"beta: must lie in (0, 1), got {beta}")
    p, q = p_logits.detach().log_softmax(-1), q_logits.log_softmax(-1)
    weights = torch.tensor([beta, 1 - beta], dtype=q.dtype, device=q.device).log()
    m = torch.logaddexp(p + weights[0], q + weights[1])
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)


def total_variation(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Give 1/2 sum |p - q|, the probability that speculative sampling rejects a draft from q."""
    return 0.5 * (p_logits.detach().softmax(-1) - q_logits.softmax(-1)).abs().sum(-1)


def total_variation_plus(p_logits: Tensor, q_logits: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Give a surrogate whose gradient is -E[A(y) grad log q(y)], y drawn from q; its value has no meaning.

    A = (r - mean r) / std r over all positions given at once, with the reward r(y) = 1 where p(y) > q(y). With
    A = r it would be the gradient of the total variation. ``tokens`` [...]: one draw of y from q at each position,
    as direct alignment has it; None takes the expectation over y in full, where the mean drops out and only the
    scale 1 / std remains.
    """
    p, q = p_logits.detach().log_softmax(-1), q_logits.log_softmax(-1)
    reward = (p > q.detach()).to(q.dtype)
    if tokens is not None:
        drawn = reward.gather(-1, tokens[..., None])[..., 0]
        return -_normalised(drawn, drawn.mean()) * q.gather(-1, tokens[..., None])[..., 0]
    weight = q.detach().exp()
    mean = (weight * reward).sum(-1).mean()
    return -(q.exp() * _normalised(reward, mean)).sum(-1)


def _normalised(reward: Tensor, mean: Tensor) -> Tensor:
    """Give (reward - mean) / std of rewards that are 0 or 1."""
    return (reward - mean) / (mean * (1 - mean)).clamp(min=1e-6).sqrt()


def divergence(name: DivergenceName, beta: float = 0.5) -> Divergence:
    """Give the divergence `name`; `beta` is that of ``jsd``. `CalibrationError` for an unknown name."""
    known: dict[str, Divergence] = {
        "fkl": forward_kl,
        "rkl": reverse_kl,
        "jsd": lambda p, q: jensen_shannon(p, q, beta),
        "tvd": total_variation,
        "tvd++": total_variation_plus,
    }
    if name not in known:
        raise CalibrationError(f"divergence: not known, got '{name}'{did_you_mean(name, get_args(DivergenceName))}")
    return known[name]


class LossHead:
    """Gives logits from states through the rows of the verifier's head that a loss looks at.

    With a ``loss_vocabulary`` of N these are the N tokens most frequent in the training text, and every step
    ``loss_others`` more, drawn without replacement from the others, whose logits are raised by
    log(others / drawn): together they then stand for all others, and both models' normalisers are estimated without
    bias. Without them a student never hears of the tokens that nobody writes, and may prefer one.
    """

    def __init__(self, head: Any, texts: Sequence[Text], settings: TrainSettings, dtype: torch.dtype) -> None:
        self._rows: Tensor = head.weight.detach().to(dtype)
        bias: Tensor | None = getattr(head, "bias", None)
        self._bias = torch.zeros_like(self._rows[:, 0]) if bias is None else bias.detach().to(dtype)
        self._temperature = settings.temperature
        size, count = len(self._rows), settings.loss_vocabulary or len(self._rows)
        self._others = torch.zeros(0, dtype=torch.long)
        self._drawn = 0
        if count < size:
            kept = frequent_tokens(texts, count, size).to(self._rows.device)
            absent = torch.ones(size, dtype=torch.bool, device=self._rows.device)
            absent[kept] = False
            self._others = absent.nonzero()[:, 0]
            self._drawn = min(settings.loss_others, len(self._others))
            self._all = (self._rows, self._bias)
            # The frequent rows stand first, for good; the drawn ones behind them change with every step.
            room = torch.cat([kept, self._others[: self._drawn]])
            self._rows, self._bias = self._rows[room], self._bias[room]
            self._kept = len(kept)

    def draw(self, generator: torch.Generator) -> None:
        """Draw the sample of other tokens for the next step."""
        if not self._drawn:
            return
        order = torch.randperm(len(self._others), generator=generator, device=self._others.device)[: self._drawn]
        chosen = self._others[order]
        self._rows[self._kept :] = self._all[0][chosen]
        raised = self._temperature * math.log(len(self._others) / self._drawn)
        self._bias[self._kept :] = self._all[1][chosen] + raised

    def logits(self, states: Tensor) -> Tensor:
        """Give logits [n, rows] divided by the temperature, in the dtype of `states` [n, hidden size]."""
        logits = functional.linear(states.to(self._rows.dtype), self._rows, self._bias).to(states.dtype)
        return logits / self._temperature


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
