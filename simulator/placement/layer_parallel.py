"""Layer-parallel drafting: EasySpec."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from calibration.common.arrays import Ints
from calibration.common.errors import CostError
from simulator.playback.replay import Replay
from simulator.pricing.costs import DraftCost, DraftPerStep, Number, StepCost
from simulator.pricing.grades import STATED, StepGrade
from simulator.rounds.protocols import Played, Round, Serial
from simulator.stopping import StoppingPolicy


class GroupedStep:
    """A draft step of `layers` layers of which `group` consecutive ones run at once: ceil(L / N) / L of `whole`.

    `sync_s`: what bringing their outputs together costs a step.
    """

    def __init__(self, whole: StepCost, layers: int, group: int, sync_s: float) -> None:
        self.whole = whole
        self._layers, self._group, self._sync_s = layers, group, sync_s
        self._share = -(-layers // group) / layers

    def step_seconds(self, batch: Number, new_tokens: Number, context_tokens: Number) -> Any:
        """Give seconds; arguments broadcast. Both token counts are sums over the batch."""
        return self.whole.step_seconds(batch, new_tokens, context_tokens) * self._share + self._sync_s

    def outside(self, batch: float, new_tokens: float, context_tokens: float) -> bool:
        """Whether the whole step lies outside of what was measured."""
        return self.whole.outside(batch, new_tokens, context_tokens)

    @property
    def rests_on(self) -> str:
        """What its seconds rest on."""
        return f"{self.whole.rests_on}, divided over groups of layers"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return STATED

    def describe(self) -> dict[str, Any]:
        """Give what the whole step is made of, and how it is divided."""
        grouping = {"layers": self._layers, "layer_group": self._group, "sync_s": self._sync_s}
        return {**self.whole.describe(), **grouping, "grouping": "assumed proportional to layers"}


def grouped_draft(draft: DraftCost | None, layers: int, group: int, sync_s: float) -> DraftPerStep:
    """Give the drafter's price with its layers grouped; `CostError` where it has no step of its own."""
    if not isinstance(draft, DraftPerStep):
        raise CostError(
            "costs.drafter: must be charged per_step for placement.kind = 'layer_parallel', "
            f"got {'no drafter' if draft is None else draft.charged}"
        )
    return DraftPerStep(GroupedStep(draft.step, layers, group, sync_s))


class LayerParallel:
    """Serial rounds whose drafter runs its layers in groups of N at once, all from the same stale input.

    EasySpec, Wu et al. 2025 (arXiv 2502.02493). A draft step takes ceil(L / N) / L of its time and a
    synchronisation (`GroupedStep`). After a round that drafted, one whole forward of the drafter over the tokens
    emitted repairs its KV cache: a calibration, part of draft_s. Stale inputs cost acceptance: an accepted token is
    lost with probability d, independently (`simulator.placement.overlapped`).

    Approximation: thinning stands for a drafter that nobody recorded, step times are assumed proportional to the
    layers run one after another, and the drafter's confidence is that of the unchanged one.
    """

    def __init__(self, draft: DraftPerStep) -> None:
        self._serial = Serial()
        step = draft.step
        self._whole = step.whole if isinstance(step, GroupedStep) else step

    def opened(self, slots: Ints) -> None:
        """Nothing to forget."""

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        played = self._serial.play(round_, left, policy, replay)
        if not (played.drafted.any() or played.draft_s):
            return played
        emitted, context = int(played.emitted.sum()), int(round_.context.sum())
        repair_s = float(self._whole.step_seconds(round_.active, emitted, context))
        round_.prices.extrapolated_iterations += self._whole.outside(round_.active, emitted, context)
        return replace(
            played,
            draft_s=played.draft_s + repair_s,
            seconds=played.seconds + repair_s,
            extra={**played.extra, "calibration_s": repair_s},
        )
