"""The drafter of nested exits: a lane drafter that also says how many layers each of its drafts needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.drafters.cut import submodel
from calibration.drafters.distilled import trained_info
from calibration.drafters.info import DrafterSettings
from calibration.drafters.lanes import ModelDrafter
from calibration.models.drafter import Drafter, Drafts, Opening, Read, Side, Tap
from calibration.models.lane import Lane, rollout
from calibration.models.load import Verifier, describe
from calibration.models.sampling import choose, entropy, processed
from calibration.traces.manifest import DrafterInfo
from calibration.trained.folder import load_drafter
from calibration.trained.nested import KIND, NestedModel
from calibration.trained.students import load_student
from calibration.trained.trainees import read_shape


@dataclass(frozen=True)
class NestedExitsDrafter:
    """Drafts with a `NestedModel`; it sees tokens alone."""

    info: DrafterInfo
    model: NestedModel
    parts: tuple[Drafter, ...] = ()
    taps: tuple[Tap, ...] = ()

    @property
    def name(self) -> str:
        """Name in the manifest."""
        return self.info.name

    def side(self, opening: Opening) -> Side:
        """Begin drafting for a batch."""
        return ModelDrafter(self.info, self.model).side(opening)

    def step(self, batch: int, context_tokens: int, noise: torch.Generator) -> Callable[[], float]:
        """Give a function that runs one draft step through all layers once; a draft takes its share of them."""
        return ModelDrafter(self.info, self.model.inner).step(batch, context_tokens, noise)

    def drafts(self, read: Read, depth: int, generator: torch.Generator) -> Drafts:
        """Give the drafts from every start: one pass over the text, then all starts as branches of one rollout.

        Exact: a draft that agrees with the text so far has seen a prefix of it, and the exit of a token depends on
        the tokens before it alone.
        """
        lane = Lane(self.model, 1)
        text, prompt = [*read.prompt_ids, *read.output_ids[:-1]], len(read.prompt_ids)
        count = len(read.output_ids)
        logits = lane.feed(torch.tensor([text], device=lane.device))[:, prompt - 1 :]
        layers = [self.model.depths[:, prompt - 1 :]]
        first = choose(logits, read.decoding, generator)
        q = processed(logits, read.decoding)
        with _noting(self.model, layers):
            later = rollout(
                lane,
                first,
                torch.arange(count, device=lane.device),
                origin=prompt,
                prompt_tokens=torch.tensor([prompt], device=lane.device),
                steps=depth,
                decoding=read.decoding,
                generator=generator,
            )
        heads = (first, q.amax(-1), entropy(q))
        tokens, sure, nats = (
            torch.cat([head[..., None], tail], -1)[0].cpu().numpy() for head, tail in zip(heads, later, strict=True)
        )
        target = torch.tensor(read.output_ids, device=lane.device)
        p = read.verifier_p
        return Drafts(
            tokens.astype(np.int32),
            confidence=sure.astype(np.float32),
            entropy=nats.astype(np.float32),
            layers=torch.stack(layers, -1)[0].cpu().numpy().astype(np.int32),
            accept=None if read.decoding.mode == "greedy" else _along(_accepted(q[0], p, target), depth),
            rank=(logits[0] > logits[0].gather(-1, target[:, None])).sum(-1).cpu().numpy().astype(np.int32),
            overlap=torch.minimum(q[0], p).sum(-1).clamp(max=1.0).float().cpu().numpy(),
        )


def verifier_exits(
    settings: DrafterSettings, thresholds: tuple[float, ...], verifier: Verifier, exits: tuple[int, ...]
) -> NestedExitsDrafter:
    """Make the drafter of untrained exits: the verifier's own norm and head behind its own layers."""
    inner = submodel(verifier.model, tuple(range(exits[-1])))
    info = DrafterInfo(
        **describe(settings.label, inner).model_dump(),
        paradigm=settings.paradigm,
        deterministic=False,
        settings=settings.model_dump(mode="json", exclude={"kind", "name", "path"}),
    )
    return NestedExitsDrafter(info, NestedModel(inner, exits[:-1], thresholds))


def trained_exits(
    settings: DrafterSettings, thresholds: tuple[float, ...], verifier: Verifier, path: str
) -> NestedExitsDrafter:
    """Load a student trained with exits; `CalibrationError` where thresholds and exits do not go together."""
    kept, tensors = load_drafter(path, KIND, verifier)
    shape = read_shape(path, kept)
    if shape.kind != "nested":
        raise CalibrationError(f"{path}: shape: must be of kind 'nested', got '{shape.kind}'")
    if len(thresholds) != len(shape.exits):
        rule = f"thresholds must be {len(shape.exits)}, one for each exit but the last"
        raise CalibrationError(f"drafter '{settings.label}': {rule}, got {len(thresholds)}")
    inner = load_student(verifier, shape, tensors)
    info = trained_info(settings, inner, path)
    return NestedExitsDrafter(info, NestedModel(inner, shape.exits, thresholds))


@contextlib.contextmanager
def _noting(model: NestedModel, found: list[Tensor]) -> Iterator[None]:
    """Append the layers that each pass of a model needed to `found`, while the block lasts."""
    handle = model.register_forward_hook(lambda module, inputs, output: found.append(module.depths))
    try:
        yield
    finally:
        handle.remove()


def _accepted(q: Tensor, p: Tensor, target: Tensor) -> NDArray[np.float32]:
    """Give min(1, q/p) of the text's own tokens [T]; where p is 0 by rounding, whether q is not."""
    q_token, p_token = (values.gather(-1, target[:, None])[:, 0] for values in (q, p))
    ratio = torch.where(p_token > 0, q_token / p_token, (q_token > 0).to(q.dtype)).clamp(max=1.0)
    found: NDArray[np.float32] = ratio.float().cpu().numpy()
    return found


def _along(values: NDArray[np.float32], depth: int) -> NDArray[np.float32]:
    """Give `values` [T] from every start on [T, depth], NaN behind the end."""
    padded = np.concatenate([values, np.full(depth - 1, np.nan, dtype=np.float32)])
    return np.lib.stride_tricks.sliding_window_view(padded, depth).astype(np.float32)
