"""Prices of steps as an engine itself took them; `simulator.pricing.observed` says how they are fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simulator.pricing.fitness import Fitness
from simulator.pricing.fitted import CurveStep
from simulator.pricing.grades import OBSERVED, StepGrade


@dataclass(frozen=True)
class ObservedStep(CurveStep):
    """Seconds of the decode or verify steps of an engine, or of the steps of a drafter in it."""

    runs: tuple[str, ...]
    fitness: Fitness
    assumed: tuple[str, ...] = ()
    change_s: float = 0.0
    """What a step takes longer that computes another number of tokens than the one before."""
    further_s: float = 0.0
    """What each further token of a sequence takes beyond what one of another sequence takes."""

    def step_seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give seconds; arguments broadcast. Both token counts are sums over the batch."""
        seconds = super().step_seconds(batch, new_tokens, context_tokens)
        return seconds + self.further_s * (new_tokens - batch) if self.further_s else seconds

    @property
    def rests_on(self) -> str:
        """What its seconds rest on."""
        return "fitted to steps of an engine"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return OBSERVED

    def describe(self) -> dict[str, Any]:
        """Give where the price comes from, how well it tells these steps, and what it assumes."""
        low, high, batch, context = self.range
        measured_range = {
            "batch": [1, int(batch)],
            "new_tokens_in_batch": [int(low), int(high)],
            "context_tokens_per_sequence": [0, int(context)],
        }
        told = {"kind": "observed", "model": self.model, "operation": self.operation, "runs": list(self.runs)}
        change = {name: value for name in ("change_s", "further_s") if (value := getattr(self, name))}
        assumed = {"assumed": list(self.assumed)} if self.assumed else {}
        return told | self.fitness.describe() | change | {"measured_range": measured_range} | assumed


@dataclass(frozen=True)
class ObservedPrefill(ObservedStep):
    """Seconds of steps that prefill prompts, alone or beside tokens that decode."""

    pair_s: float = 0.0
    beside_s: float = 0.0
    mixed: Fitness | None = None

    def step_seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give seconds; arguments broadcast. Both token counts are sums over the batch."""
        return super().step_seconds(batch, new_tokens, 0) + self.pair_s * pairs(batch, new_tokens, context_tokens)

    def added_seconds(self, batch: int, new_tokens: int, context_tokens: int, beside_tokens: int) -> float:
        """Give what prefilling adds to a step that computes `beside_tokens` of others anyway."""
        joint = super().step_seconds(batch + 1, beside_tokens + new_tokens, 0)
        attention = self.pair_s * pairs(batch, new_tokens, context_tokens)
        return max(float(joint + attention - super().step_seconds(1, beside_tokens, 0)) + self.beside_s, 0.0)

    def describe(self) -> dict[str, Any]:
        """Give where the price comes from, that of mixed steps too."""
        mixed = {} if self.mixed is None else {"mixed": {**self.mixed.describe(), "beside_s": self.beside_s}}
        return super().describe() | mixed


@dataclass(frozen=True)
class ObservedRound:
    """Seconds that drafting adds to a round: round_s + step_s D / b + token_s D, for D drafted tokens of b sequences.

    For engines that do not tell their drafters' steps: what the steps of `runs` took beyond the verifier's price.
    """

    model: str
    runs: tuple[str, ...]
    round_s: float = 0.0
    step_s: float = 0.0
    token_s: float = 0.0
    rounds: int = 0

    def step_seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give seconds; arguments broadcast. `new_tokens` are the drafted ones, a sum over the batch."""
        return self.round_s + self.step_s * new_tokens / batch + self.token_s * new_tokens + 0 * context_tokens

    def outside(self, batch: float, new_tokens: float, context_tokens: float) -> bool:
        """Never: the verifier's step of the same round says it."""
        return False

    @property
    def rests_on(self) -> str:
        """What its seconds rest on."""
        return "fitted to steps of an engine"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return OBSERVED

    def describe(self) -> dict[str, Any]:
        """Give the constants and where they come from."""
        why = "what rounds took beyond the verifier's price" if self.rounds else "no step of these runs drafted"
        constants = {"round_s": self.round_s, "step_s": self.step_s, "token_s": self.token_s}
        told = {"kind": "observed", "model": self.model, "operation": "draft", "runs": list(self.runs)}
        return told | {"rounds": self.rounds, **constants, "assumed": [f"no draft steps are told: {why}"]}


@dataclass(frozen=True)
class PromptTokens:
    """What a drafter adds to prefill, `token_s` a prompt token, where an engine does not tell its steps."""

    token_s: float

    def step_seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give seconds; arguments broadcast. `new_tokens` is a sum over the batch."""
        return self.token_s * new_tokens


def pairs(batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
    """Give how many pairs of tokens attend to each other in `batch` prompts of equal length; arguments broadcast."""
    return new_tokens * (new_tokens / 2 + context_tokens) / batch
