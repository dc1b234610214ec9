"""The drafter of a dynamic exit: drafts from every start at once, and step by step over a batch.

Sampled decoding: how far a draft goes depends on what was drawn before, so drafts and their acceptance are drawn
together. Given the text, the draft at x_i is x_i with probability min(1, q/p), and accepted; else it is drawn from
norm([q - p]+), rejected, and the draft goes on from q by itself. That is the law of a live round given the text it
emitted, so the replay of a recorded (run length, proposal length) is exact in distribution.

The drafter of nested exits: a lane drafter that also says how many layers each of its drafts needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.drafters.cut import submodel
from calibration.drafters.distilled import trained_info
from calibration.drafters.exit_plan import HitRates, Plan, Planning, make_plan
from calibration.drafters.info import DrafterSettings
from calibration.drafters.lanes import ModelDrafter, agreed
from calibration.models.drafter import Drafter, Drafts, Opening, Proposal, Read, Side, States, Tap
from calibration.models.lane import Lane, pad_left, rollout
from calibration.models.load import Verifier, describe
from calibration.models.sampling import choose, draw, entropy, processed, residual
from calibration.traces.manifest import DecodingInfo, DrafterInfo
from calibration.trained.folder import load_drafter
from calibration.trained.nested import KIND, NestedModel
from calibration.trained.students import load_student
from calibration.trained.trainees import read_shape

_CHUNK = 256
"""States whose logits are held at once."""


@dataclass(frozen=True)
class ExitDrafter:
    """Drafts with one of `models`, the exits of a verifier, chosen at every start as `planning` says."""

    info: DrafterInfo
    planning: Planning
    models: tuple[Any, ...]
    parts: tuple[Drafter, ...] = ()
    model: None = None

    @property
    def name(self) -> str:
        """Name in the manifest."""
        return self.info.name

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The outputs of the last layers of its exits."""
        return tuple(layers - 1 for layers in self.planning.exits)

    def side(self, opening: Opening) -> Side:
        """Begin drafting for a batch."""
        return ExitSide(self, opening)

    def step(self, batch: int, context_tokens: int, noise: torch.Generator) -> Callable[[], float]:
        """Give a function that runs one draft step of the deepest exit once; the others take their share of it."""
        from calibration.drafters.timing import forward_step

        return forward_step(self.models[-1], batch, 1, context_tokens)

    def drafts(self, read: Read, depth: int, generator: torch.Generator) -> Drafts:
        """Give the drafts from every start: all starts of one exit are branches of one packed rollout."""
        plans = self.plans(read)
        width = min(depth, self.planning.max_draft_tokens)
        found = _Found(len(plans), width)
        for index, (layers, model) in enumerate(zip(self.planning.exits, self.models, strict=True)):
            starts = np.flatnonzero([plan.exit == index and plan.tokens > 0 for plan in plans])
            if len(starts):
                chosen = [plans[start] for start in starts.tolist()]
                _Rollout(read, model, generator).run(starts, chosen, layers, found)
        return found.drafts(read.decoding)

    def plans(self, read: Read) -> list[Plan]:
        """Give what every start t plans, from the shadow tokens of the prompt and of x_0 .. x_{t-1}."""
        text = torch.tensor([*read.prompt_ids, *read.output_ids])
        hits = self.hits(read.verifier, {tap: read.states[tap] for tap in self.taps}, text[1:])
        rates = HitRates(len(self.models), self.planning.half_life)
        prompt = len(read.prompt_ids)
        rates.add(hits[: prompt - 1])
        plans = []
        for t in range(len(read.output_ids)):
            plans.append(make_plan(self.planning, rates.rates))
            rates.add(hits[prompt - 1 + t : prompt + t])
        return plans

    def hits(self, verifier: Any, states: States, tokens: Tensor) -> NDArray[np.bool_]:
        """Say whether the shadow token of each exit is the token that came [tokens, exits].

        `states` [tokens, hidden size] of every tap are those from which `tokens` [tokens] were to be predicted.
        """
        norm, head = verifier.model.norm, verifier.get_output_embeddings()
        columns = []
        for tap in self.taps:
            parts = [head(norm(part)).argmax(-1).cpu() for part in torch.split(states[tap], _CHUNK)]
            columns.append(torch.cat(parts) == tokens)
        right: NDArray[np.bool_] = torch.stack(columns, 1).numpy()
        return right


class _Found:
    """Room for `count` drafts of up to `width` tokens; see `Drafts` for the arrays."""

    def __init__(self, count: int, width: int) -> None:
        self.tokens: NDArray[np.int32] = np.full((count, width), -1, dtype=np.int32)
        self.confidence = np.full((count, width), np.nan, dtype=np.float32)
        self.entropy, self.accept = self.confidence.copy(), self.confidence.copy()
        self.layers: NDArray[np.int32] = np.zeros((count, width), dtype=np.int32)
        self.runs: NDArray[np.int64] = np.zeros(count, dtype=np.int64)
        self.rank: NDArray[np.int32] = np.zeros(count, dtype=np.int32)
        self.overlap = np.zeros(count, dtype=np.float32)

    def note(self, rows: NDArray[np.int64], step: int, token: Tensor, q: Tensor, layers: int) -> None:
        """Write what the starts `rows` draft at one step."""
        self.tokens[rows, step] = token.cpu().numpy()
        self.layers[rows, step] = layers
        self.confidence[rows, step] = q.amax(-1).cpu().numpy()
        self.entropy[rows, step] = entropy(q).cpu().numpy()

    def drafts(self, decoding: DecodingInfo) -> Drafts:
        """Give them; in greedy decoding acceptance follows from the tokens."""
        found = Drafts(self.tokens, confidence=self.confidence, entropy=self.entropy, layers=self.layers)
        found = replace(found, rank=self.rank, overlap=self.overlap)
        return found if decoding.mode == "greedy" else replace(found, accept=self.accept, runs=self.runs)


class _Rollout:
    """One exit's drafts from many starts of one text: branches of one packed forward pass a step."""

    def __init__(self, read: Read, model: Any, generator: torch.Generator) -> None:
        self._read, self._generator = read, generator
        self._lane = Lane(model, 1)
        self._text = torch.tensor(read.output_ids, device=self._lane.device)

    def run(self, starts: NDArray[np.int64], plans: Sequence[Plan], layers: int, found: _Found) -> None:
        """Draft from `starts` into the rows of `found`; a branch ends where its plan or its confidence does."""
        lane, device, prompt = self._lane, self._lane.device, len(self._read.prompt_ids)
        whole = torch.tensor([[*self._read.prompt_ids, *self._read.output_ids[:-1]]], device=device)
        at = torch.as_tensor(starts, device=device)
        logits = lane.feed(whole, last=len(self._text))[0, at]
        visible = torch.arange(whole.shape[1], device=device) < (prompt + at)[:, None]
        wanted = torch.tensor([plan.tokens for plan in plans], device=device)
        least = torch.tensor([plan.threshold for plan in plans], dtype=torch.float64, device=device)
        sure, on = torch.ones_like(least), torch.ones_like(at, dtype=torch.bool)
        for step in range(found.tokens.shape[1]):
            q = processed(logits, self._read.decoding)
            token, on = self._drawn(logits, q, at, step, on, found)
            found.note(at.cpu().numpy(), step, token, q, layers)
            sure = sure * q.amax(-1)
            going = (step + 1 < wanted) & (sure >= least)
            if not bool(going.any()):
                break
            at, wanted, least, sure, on, token = (x[going] for x in (at, wanted, least, sure, on, token))
            own = torch.eye(len(at), dtype=torch.bool, device=device)
            visible = torch.cat([visible[going], own], 1)
            logits = lane.forward(token[None], (prompt + at + step)[None], visible[None])[0]

    def _drawn(
        self, logits: Tensor, q: Tensor, at: Tensor, step: int, on: Tensor, found: _Found
    ) -> tuple[Tensor, Tensor]:
        """Give each branch's next draft, and whether the branch is still accepted; note acceptance in `found`.

        `on`: whether the branch was accepted so far, which is to say whether it is the text.
        """
        greedy = self._read.decoding.mode == "greedy"
        if greedy and step:
            return logits.argmax(-1), on
        ahead = on & (at + step < len(self._text))
        place = (at + step).clamp(max=len(self._text) - 1)
        p, x, rows = self._read.verifier_p[place], self._text[place], at.cpu().numpy()
        if step == 0:
            found.rank[rows] = (logits > logits.gather(1, x[:, None])).sum(-1).cpu().numpy()
            found.overlap[rows] = torch.minimum(p, q).sum(-1).clamp(max=1.0).cpu().numpy()
        if greedy:
            return logits.argmax(-1), on
        p_x, q_x = (values.gather(1, x[:, None])[:, 0] for values in (p, q))
        # p(x) is 0 only by rounding between two passes; the limit p -> 0 is then taken.
        accept = torch.where(p_x > 0, q_x / p_x, (q_x > 0).float()).clamp(max=1.0)
        accepted = ahead & (torch.rand(len(at), generator=self._generator, device=at.device) < accept)
        refused = (ahead & ~accepted)[:, None]
        token = draw(torch.where(refused, residual(q, p), q), self._generator)
        found.accept[rows, step] = torch.where(ahead, accept, torch.nan).cpu().numpy()
        found.runs[rows] += accepted.cpu().numpy()
        return torch.where(accepted, x, token), accepted


class ExitSide:
    """A lane per exit, and the hit rates of every row."""

    def __init__(self, drafter: ExitDrafter, opening: Opening) -> None:
        self._drafter, self._verifier, self._decoding = drafter, opening.verifier, opening.decoding
        self._lanes = [_ExitLane(model, opening) for model in drafter.models]
        half_life = drafter.planning.half_life
        self._rates = [HitRates(len(drafter.models), half_life) for _ in opening.prompts]
        texts = [[*prompt[1:], token] for prompt, token in zip(opening.prompts, opening.first, strict=True)]
        self._learn(texts, opening.states)

    def draft(self, gamma: int, generator: torch.Generator) -> Proposal:
        """Let the exit that each row has chosen draft up to `gamma` tokens, in lock step for all rows of an exit."""
        plans = [make_plan(self._drafter.planning, rates.rates) for rates in self._rates]
        parts = []
        for index, lane in enumerate(self._lanes):
            wanted = [min(plan.tokens, gamma) if plan.exit == index else 0 for plan in plans]
            if any(wanted):
                least = [plan.threshold for plan in plans]
                parts.append(lane.draft(wanted, least, self._decoding, generator))
        return _overlaid(parts, self._verifier, len(plans), self._decoding)

    def commit(self, emitted: Sequence[Sequence[int]], states: Mapping[Tap, Sequence[Tensor]]) -> None:
        """Take in the emitted tokens: the lanes to read them, the rates to learn from the verifier's states."""
        for lane in self._lanes:
            lane.commit(emitted)
        self._learn(emitted, states)

    def _learn(self, texts: Sequence[Sequence[int]], states: Mapping[Tap, Sequence[Tensor]]) -> None:
        """Take in the tokens of each row, which the verifier's `states` were to predict."""
        joined = {tap: torch.cat(list(states[tap])) for tap in self._drafter.taps}
        hits = self._drafter.hits(self._verifier, joined, torch.tensor([token for row in texts for token in row]))
        ends = np.cumsum([len(row) for row in texts])[:-1]
        for rates, mine in zip(self._rates, np.split(hits, ends), strict=True):
            rates.add(mine)


class _ExitLane:
    """One exit's cache over a batch; rows that others draft for wait until it is their turn."""

    def __init__(self, model: Any, opening: Opening) -> None:
        self._lane = Lane(model, len(opening.prompts))
        self._pending = [[*prompt, token] for prompt, token in zip(opening.prompts, opening.first, strict=True)]
        self._fed: list[list[int]] = [[] for _ in opening.prompts]
        self._columns = 0

    def draft(
        self, wanted: Sequence[int], least: Sequence[float], decoding: DecodingInfo, generator: torch.Generator
    ) -> Proposal:
        """Draft up to `wanted` tokens per row (0: none), until the cumulative confidence is below `least`."""
        device = self._lane.device
        more, bar = torch.tensor(wanted, device=device), torch.tensor(least, dtype=torch.float64, device=device)
        going, sure = more > 0, torch.ones_like(bar)
        logits = self._lane.feed(*pad_left(self._turn(wanted), device), last=1)[:, -1]
        tokens, real, dists = [], [], []
        for step in range(max(wanted)):
            q = processed(logits, decoding)
            tokens.append(logits.argmax(-1) if decoding.mode == "greedy" else draw(q, generator))
            real.append(going)
            dists.append(q)
            sure = sure * q.amax(-1)
            going = going & (step + 1 < more) & (sure >= bar)
            if not bool(going.any()):
                break
            logits = self._lane.feed(tokens[-1][:, None], going[:, None])[:, -1]
            self._note(tokens[-1], going)
        mask, q = torch.stack(real, 1), torch.stack(dists, 1)
        return Proposal(torch.stack(tokens, 1), mask.sum(1), q * mask[..., None], confidence=q.amax(-1))

    def commit(self, emitted: Sequence[Sequence[int]]) -> None:
        """Keep the drafts that were emitted in the cache; the other emitted tokens wait."""
        kept = [agreed(fed, row) for fed, row in zip(self._fed, emitted, strict=True)]
        if self._columns:
            column = torch.arange(self._columns, device=self._lane.device)
            self._lane.forget(column >= torch.tensor(kept, device=self._lane.device)[:, None])
        for pending, row, count in zip(self._pending, emitted, kept, strict=True):
            pending.extend(row[count:])
        self._fed, self._columns = [[] for _ in self._fed], 0

    def _turn(self, wanted: Sequence[int]) -> list[list[int]]:
        """Give what the rows that draft have not fed yet, and nothing for the others."""
        turn = [pending if tokens else [] for pending, tokens in zip(self._pending, wanted, strict=True)]
        self._pending = [[] if tokens else row for row, tokens in zip(self._pending, wanted, strict=True)]
        return turn

    def _note(self, token: Tensor, fed: Tensor) -> None:
        self._columns += 1
        for row, value, taken in zip(self._fed, token.tolist(), fed.tolist(), strict=True):
            if taken:
                row.append(value)


def _overlaid(parts: Sequence[Proposal], verifier: Any, rows: int, decoding: DecodingInfo) -> Proposal:
    """Give one proposal out of several, of which each row has at most one."""
    width = max((part.tokens.shape[1] for part in parts), default=0)
    device = verifier.device
    tokens = torch.zeros(rows, width, dtype=torch.long, device=device)
    counts = torch.zeros(rows, dtype=torch.long, device=device)
    confidence = torch.full((rows, width), torch.nan, device=device)
    q = torch.zeros(rows, width, verifier.config.vocab_size, device=device) if decoding.mode == "sampled" else None
    for part in parts:
        mine, steps = part.counts > 0, part.tokens.shape[1]
        tokens[mine, :steps] = part.tokens[mine]
        counts[mine] = part.counts[mine]
        if part.confidence is not None:
            confidence[mine, :steps] = part.confidence[mine]
        if q is not None and part.q is not None:
            q[mine, :steps] = part.q[mine]
    return Proposal(tokens, counts, q, confidence=confidence)


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
