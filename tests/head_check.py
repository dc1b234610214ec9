"""Is the packed rollout what a step-by-step loop drafts? Asked depth by depth, one start at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.models.drafter import Read
from calibration.trained.head_drafting import HeadDrafter


@dataclass(frozen=True)
class DepthCheck:
    """One depth (from 1): starts compared, tokens that agree, and the largest difference of a feature.

    A feature counts where the drafts before it agree: only there do both read the same.
    """

    depth: int
    starts: int
    agreeing: int
    difference: float


@torch.inference_mode()
def check_depths(drafter: HeadDrafter, read: Read, depth: int, starts: Sequence[int]) -> tuple[DepthCheck, ...]:
    """Compare greedy drafts from `starts` of a text, packed against one by one, at every depth up to `depth`.

    The loop keeps no cache and packs nothing: at each depth of an EAGLE head it runs over all pairs from the
    beginning. In exact arithmetic both agree everywhere; rounding may turn a draft between two nearly equal logits.
    `CalibrationError` where a start lies outside the text or has no state before it.
    """
    least = max(0, 2 - len(read.prompt_ids))
    for start in starts:
        if not least <= start < len(read.output_ids):
            raise CalibrationError(f"start: must lie in [{least}, {len(read.output_ids) - 1}], got {start}")
    limit = drafter.limit(depth)
    tokens, features = _packed(drafter, read, limit, starts)
    found = [(0, 0, 0.0)] * limit
    for row, start in enumerate(starts):
        one, mine = step_by_step(drafter, read, limit, start)
        for step in range(limit):
            agrees = one[step] == tokens[row][step]
            count, agreeing, worst = found[step]
            gap = float((features[row, step] - mine[step]).abs().max())
            found[step] = count + 1, agreeing + agrees, max(worst, gap)
            if not agrees:
                break
    return tuple(DepthCheck(step + 1, *values) for step, values in enumerate(found))


@torch.inference_mode()
def step_by_step(drafter: HeadDrafter, read: Read, depth: int, start: int) -> tuple[list[int], Tensor]:
    """Draft greedily from one start, without cache or packing; give tokens and features [drafts, hidden size]."""
    features, tokens = _known(drafter, read, start)
    drafts: list[int] = []
    seen: list[Tensor] = []
    rounds = drafter.limit(depth) if drafter.head.autoregressive else 1
    for _ in range(rounds):
        past = drafter.read(None, features[None], tokens[None])
        branches = past.branches(torch.tensor([[len(tokens) - 1]], device=tokens.device))
        steps = 1 if drafter.head.autoregressive else drafter.limit(depth)
        greedy = _Greedy(drafter)
        seen += [g[0, 0] for g in drafter.head.unroll(past, branches, steps, greedy)]
        drafts += [int(token) for token in greedy.tokens]
        features = torch.cat([features, seen[-1][None]])
        tokens = torch.cat([tokens, tokens.new_tensor(drafts[-1:])])
    return drafts, torch.stack(seen)


def _known(drafter: HeadDrafter, read: Read, start: int) -> tuple[Tensor, Tensor]:
    """Give the pairs that are known at `start`: states [n, hidden size] and the tokens behind them [n]."""
    count = len(read.prompt_ids) + start - 1
    text = torch.tensor([*read.prompt_ids, *read.output_ids], device=drafter.verifier.device)
    return read.states["norm"][:count], text[1 : count + 1]


def _packed(drafter: HeadDrafter, read: Read, limit: int, starts: Sequence[int]) -> tuple[list[list[int]], Tensor]:
    """Draft from all `starts` at once as recording does; give tokens and features [S, limit, hidden size]."""
    features, tokens = _known(drafter, read, max(starts))
    past = drafter.read(None, features[None], tokens[None])
    last = torch.tensor([list(starts)], device=tokens.device) + len(read.prompt_ids) - 2
    greedy = _Greedy(drafter)
    found = drafter.head.unroll(past, past.branches(last), limit, greedy)
    return torch.stack(greedy.tokens, -1)[0].tolist(), torch.stack(found, 2)[0]


class _Greedy:
    """Follows the largest logit."""

    def __init__(self, drafter: HeadDrafter) -> None:
        self.verifier, self.tokens = drafter.verifier, list[Tensor]()

    def __call__(self, step: int, features: Tensor) -> Tensor:
        self.tokens.append(self.verifier.get_output_embeddings()(features).argmax(-1))
        embedded: Tensor = self.verifier.get_input_embeddings()(self.tokens[-1])
        return embedded
