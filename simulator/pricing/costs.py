"""Costs: seconds of a step of one model on one device.

Every model answers ``step_seconds(batch, new_tokens, context_tokens)``, vectorised, where *new_tokens* and
*context_tokens* (tokens already in the cache) are **sums over the batch**, not counts per sequence.
"""

from __future__ import annotations

import bisect
from typing import Any, Protocol

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CostError
from calibration.traces.manifest import FractionOfVerify, LinearCost
from simulator.pricing.grades import STATED, StepGrade, lowest_step_grade
from simulator.pricing.observed import ObservedPrefill, ObservedStep, PromptTokens
from simulator.pricing.roofline import RooflineStep

Number = float | Floats | Ints


class StepCost(Protocol):
    """Seconds of one step of one model."""

    def step_seconds(self, batch: Number, new_tokens: Number, context_tokens: Number) -> Any:
        """Give seconds; arguments broadcast. Both token counts are sums over the batch."""
        ...

    def outside(self, batch: float, new_tokens: float, context_tokens: float) -> bool:
        """Whether this step lies outside of what was measured."""
        ...

    def describe(self) -> dict[str, Any]:
        """Give what the price is made of, with its error where that is known."""
        ...

    @property
    def rests_on(self) -> str:
        """What its seconds rest on, in a few words."""
        ...

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        ...


class LinearStep:
    """base_s + per_token_s * new tokens + per_context_token_s * cached tokens; stated, not measured."""

    def __init__(self, cost: LinearCost, source: str) -> None:
        self._cost = cost
        self._source = source
        self._base, self._token, self._context = cost.base_s, cost.per_token_s, cost.per_context_token_s

    def step_seconds(self, batch: Number, new_tokens: Number, context_tokens: Number) -> Any:
        """Give seconds; arguments broadcast. Both token counts are sums over the batch."""
        return self._base + self._token * new_tokens + self._context * context_tokens

    def outside(self, batch: float, new_tokens: float, context_tokens: float) -> bool:
        """Never: the range of stated constants is not known."""
        return False

    @property
    def rests_on(self) -> str:
        """What its seconds rest on."""
        return "stated linear constants"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return STATED

    def describe(self) -> dict[str, Any]:
        """Give the constants and where they come from."""
        return {**self._cost.model_dump(exclude={"charged"}), "source": self._source}


class PluginStep:
    """Step times that an entry point (settings, model) -> cost gives; what it gives is checked.

    Graded as stated: nothing here knows what they were fitted to.
    """

    def __init__(self, name: str, cost: Any, place: str) -> None:
        self._name, self._cost, self._place = name, cost, place

    def step_seconds(self, batch: Number, new_tokens: Number, context_tokens: Number) -> Any:
        """Give seconds."""
        seconds = np.asarray(self._cost.step_seconds(batch, new_tokens, context_tokens), dtype=np.float64)
        shape = np.broadcast_shapes(np.shape(batch), np.shape(new_tokens), np.shape(context_tokens))
        if seconds.shape != shape or not np.isfinite(seconds).all() or bool((seconds < 0).any()):
            raise CostError(
                f"{self._place}: plugin '{self._name}' must give seconds >= 0 in the shape of its arguments, "
                f"{shape}, got {seconds}"
            )
        return seconds

    def outside(self, batch: float, new_tokens: float, context_tokens: float) -> bool:
        """Whether the plug-in says that it never measured such a step."""
        return hasattr(self._cost, "outside") and bool(self._cost.outside(batch, new_tokens, context_tokens))

    @property
    def rests_on(self) -> str:
        """Whose they are."""
        return f"step times of plugin '{self._name}'"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return STATED

    def describe(self) -> dict[str, Any]:
        """Give what the plug-in tells of itself."""
        told = dict(self._cost.describe()) if hasattr(self._cost, "describe") else {}
        return {"kind": "plugin", "name": self._name} | told


class DraftPerStep:
    """Drafting in lock step: the j-th draft step is one step of the slots that still draft, one token each.

    Slots whose draft is complete wait; the context of a slot grows by one with every token it drafted.
    """

    charged = "per_step"

    def __init__(self, step: StepCost) -> None:
        self.step = step

    def seconds(
        self, drafted: Ints, context: Ints, verify_s: float, share: Floats | None = None
    ) -> tuple[float, bool]:
        """Give (seconds, whether outside the measured range) of drafting `drafted` tokens per slot.

        `share` (slots, steps): the part of a whole step's layers that each token runs, where that varies.
        """
        longest = int(drafted.max())
        if longest == 0:
            return 0.0, False
        if share is not None:
            return self._by_depth(share, context)
        # Slots still drafting, and their context, at steps 0 .. longest-1: all minus those that have finished.
        still = len(drafted) - np.bincount(drafted, minlength=longest + 1).cumsum()[:longest]
        left = np.bincount(drafted, weights=context, minlength=longest + 1).cumsum()[:longest]
        cached = context.sum() - left + np.arange(longest) * still
        seconds = float(self.step.step_seconds(still, still, cached).sum())
        # The first step has the most slots, the last one the longest contexts.
        first = self.step.outside(float(still[0]), float(still[0]), float(cached[0]))
        last = longest > 1 and self.step.outside(float(still[-1]), float(still[-1]), float(cached[-1]))
        return seconds, first or last

    def _by_depth(self, share: Floats, context: Ints) -> tuple[float, bool]:
        """Price steps of unequal depth: each band of layers is run by the slots whose token goes that deep.

        A band takes its part of a whole step of these slots: an approximation, see `simulator.playback.draft_shapes`.
        """
        seconds, outside, below = 0.0, False, 0.0
        reached = context[:, None] + np.arange(share.shape[1])
        for level in np.unique(share[share > 0]).tolist():
            mine = share >= level
            steps = np.flatnonzero(mine.any(axis=0))
            still, cached = mine.sum(axis=0)[steps], np.where(mine, reached, 0).sum(axis=0)[steps]
            seconds += (level - below) * float(self.step.step_seconds(still, still, cached).sum())
            edges = ((float(still[j]), float(cached[j])) for j in (0, -1))
            outside = outside or any(self.step.outside(slots, slots, tokens) for slots, tokens in edges)
            below = level
        return seconds, outside


class DraftPerRound:
    """One step a round, whatever its length, even where nothing is drafted (published EAGLE constants)."""

    charged = "per_round"

    def __init__(self, step: StepCost, tokens: bool) -> None:
        self.step = step
        self.tokens = tokens
        """Whether the price counts drafted tokens (constants) or slots (a measured one-shot lookup)."""

    def seconds(
        self, drafted: Ints, context: Ints, verify_s: float, share: Floats | None = None
    ) -> tuple[float, bool]:
        """Give (seconds, whether outside the measured range) of one round; `share` changes nothing."""
        batch = len(drafted)
        new, cached = int(drafted.sum()) if self.tokens else batch, int(context.sum())
        return float(self.step.step_seconds(batch, new, cached)), self.step.outside(batch, new, cached)


class DraftFraction:
    """A fraction of the round's verification (n-gram lookup on the host, as published)."""

    charged = "per_round"

    def __init__(self, cost: FractionOfVerify, source: str) -> None:
        self._cost = cost
        self._source = source

    def seconds(
        self, drafted: Ints, context: Ints, verify_s: float, share: Floats | None = None
    ) -> tuple[float, bool]:
        """Give (seconds, False); `share` changes nothing."""
        return self._cost.fraction * verify_s, False

    @property
    def step(self) -> DraftFraction:
        """Itself: it has no step of its own."""
        return self

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return STATED

    def describe(self) -> dict[str, Any]:
        """Give the fraction and where it comes from."""
        return {**self._cost.model_dump(), "source": self._source}


DraftCost = DraftPerStep | DraftPerRound | DraftFraction


class Sharded:
    """A stated linear step on several devices: its seconds / `size` + `all_reduce_s`. An assumption."""

    def __init__(self, step: LinearStep, size: int, all_reduce_s: float) -> None:
        self._step, self._size, self._all_reduce_s = step, size, all_reduce_s

    def step_seconds(self, batch: Number, new_tokens: Number, context_tokens: Number) -> Any:
        """Give seconds; arguments broadcast. Both token counts are sums over the batch."""
        return self._step.step_seconds(batch, new_tokens, context_tokens) / self._size + self._all_reduce_s

    def outside(self, batch: float, new_tokens: float, context_tokens: float) -> bool:
        """Never: the range of stated constants is not known."""
        return False

    @property
    def rests_on(self) -> str:
        """What its seconds rest on."""
        return f"{self._step.rests_on}, divided over devices"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return STATED

    def describe(self) -> dict[str, Any]:
        """Give the constants, and that their division is assumed."""
        shards = {
            "tensor_parallel_size": self._size,
            "all_reduce_s": self._all_reduce_s,
            "sharding": "assumed linear",
        }
        return self._step.describe() | shards


class Prices:
    """What an engine iteration costs, and how many prices lay outside of the measured range.

    Prefill is a verifier step on the prompt tokens; the drafter's own prefill is charged where `draft_prefill` has
    its price. Verification of a decode round is priced at the next of `capture_sizes` (ascending) where there is one:
    vLLM pads a step to the sizes that its CUDA graphs were captured for.
    """

    def __init__(
        self,
        prefill: StepCost,
        verify: StepCost,
        draft: DraftCost | None,
        overhead_s: float,
        capture_sizes: tuple[int, ...] = (),
    ) -> None:
        self.prefill, self.verify, self.draft, self.overhead_s = prefill, verify, draft, overhead_s
        self.capture_sizes = capture_sizes
        self.draft_prefill: ObservedPrefill | PromptTokens | None = None
        """Price of prompts in the one drafter, where it was observed."""
        self.by_drafter: dict[str, DraftCost] = {}
        """Prices of several drafters among whom requests are routed; `draft` is None then."""
        self.extrapolated_iterations = 0
        self._tokens = 0

    def changed_s(self, tokens: int) -> float:
        """Give what a step takes longer that computes `tokens` because the one before computed another number.

        To be called once a step: it remembers. 0 unless costs are observed.
        """
        changed, self._tokens = tokens != self._tokens, tokens
        return self.verify.change_s if changed and isinstance(self.verify, ObservedStep) else 0.0

    def prefill_s(self, batch: int, prompt_tokens: int, context_tokens: int = 0) -> float:
        """Give the seconds for prefilling `prompt_tokens` behind `context_tokens`: sums over the batch."""
        self.extrapolated_iterations += self.prefill.outside(batch, prompt_tokens, context_tokens)
        seconds = float(self.prefill.step_seconds(batch, prompt_tokens, context_tokens))
        return seconds + self._drafter_prefill_s(batch, prompt_tokens, context_tokens)

    def _drafter_prefill_s(self, batch: int, prompt_tokens: int, context_tokens: int) -> float:
        if self.draft_prefill is None:
            return 0.0
        return float(self.draft_prefill.step_seconds(batch, prompt_tokens, context_tokens))

    def added_prefill_s(self, batch: int, prompt_tokens: int, context_tokens: int, beside_tokens: int) -> float:
        """Give the seconds that prefill chunks add to a decode step of `beside_tokens`.

        Observed: what one joint pass of all tokens takes longer. Else a prefill step without its fixed part, exact
        for linear costs; for those fitted to timings an approximation, as mixed steps are not timed.
        """
        if isinstance(self.prefill, ObservedPrefill | RooflineStep):
            self.extrapolated_iterations += self.prefill.outside(batch, prompt_tokens, context_tokens)
            added = self.prefill.added_seconds(batch, prompt_tokens, context_tokens, beside_tokens)
            return added + self._drafter_prefill_s(batch, prompt_tokens, context_tokens)
        return self.prefill_s(batch, prompt_tokens, context_tokens) - float(self.prefill.step_seconds(1, 0, 0))

    def verify_s(self, batch: int, tokens: int, context_tokens: int) -> tuple[float, bool]:
        """Give (seconds, whether outside of the measured range) of verifying `tokens` in all."""
        if self.capture_sizes:
            size = bisect.bisect_left(self.capture_sizes, tokens)
            tokens = self.capture_sizes[size] if size < len(self.capture_sizes) else tokens
        outside = self.verify.outside(batch, tokens, context_tokens)
        return float(self.verify.step_seconds(batch, tokens, context_tokens)), outside

    def decode_s(
        self,
        drafted: Ints | None,
        context: Ints,
        total_context: int,
        verified: Ints | None = None,
        share: Floats | None = None,
    ) -> tuple[float, float]:
        """Give (draft seconds, verifier seconds) of a decode round; `drafted` None where there is no drafter.

        `verified`: tokens that are verified per slot, where a draft `drafted` deep is a tree. `share`: see
        `DraftPerStep`.
        """
        batch = len(context)
        tokens = batch if drafted is None else batch + int((drafted if verified is None else verified).sum())
        verify_s, outside = self.verify_s(batch, tokens, total_context)
        draft_s = 0.0
        if drafted is not None and self.draft is not None:
            draft_s, beyond = self.draft.seconds(drafted, context, verify_s, share)
            outside = outside or beyond
        self.extrapolated_iterations += outside
        return draft_s, verify_s

    def partly_verified_s(
        self,
        drafted: Ints,
        verified: Ints,
        context: Ints,
        total_context: int,
        share: Floats | None = None,
    ) -> tuple[float, float]:
        """Give (draft seconds, verifier seconds) of a round that verifies `verified` of the `drafted` tokens only."""
        batch = len(context)
        verify_s, outside = self.verify_s(batch, batch + int(verified.sum()), total_context)
        draft_s, beyond = 0.0, False
        if self.draft is not None:
            draft_s, beyond = self.draft.seconds(drafted, context, verify_s, share)
        self.extrapolated_iterations += outside or beyond
        return draft_s, verify_s

    @property
    def grades(self) -> dict[str, StepGrade]:
        """Grade of the verifier's steps, of drafting where anything drafts, and of a host overhead if charged."""
        drafts = [cost.step.grade for cost in (self.draft, *self.by_drafter.values()) if cost is not None]
        found = {"verifier": lowest_step_grade((self.prefill.grade, self.verify.grade))}
        found |= {"drafter": lowest_step_grade(drafts)} if drafts else {}
        return found | ({"host overhead": STATED} if self.overhead_s else {})

    def describe(self) -> dict[str, Any]:
        """Give what every price is made of."""
        parts: dict[str, Any] = {
            "overhead_s": self.overhead_s,
            "prefill": self.prefill.describe(),
            "verify": self.verify.describe(),
        }
        if self.capture_sizes:
            parts["cudagraph_capture_sizes"] = list(self.capture_sizes)
        if self.draft is not None:
            parts["draft"] = _told(self.draft)
        if self.by_drafter:
            parts["draft"] = {"kind": "by_drafter", **{name: _told(cost) for name, cost in self.by_drafter.items()}}
        return parts


def _told(cost: DraftCost) -> dict[str, Any]:
    return {**cost.step.describe(), "charged": cost.charged}
