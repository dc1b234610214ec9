"""Two drafters in one, as kinds of a job: one before the other, both merged into a tree, or retrieval fused.

Each names its two parts as tables of their own (``first = {kind = "prompt-lookup"}``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from calibration.common.errors import CalibrationError
from calibration.common.settings import Count
from calibration.drafters.info import DrafterSettings
from calibration.models.load import Verifier
from calibration.traces.manifest import DrafterInfo

if TYPE_CHECKING:
    from calibration.drafters.info import AnyDrafter
    from calibration.drafters.pairs import Before, FusedDrafter, Merged
    from calibration.models.drafter import Drafter


class NgramBeforeModel(DrafterSettings):
    """``first`` drafts where it proposes at least ``least_tokens`` tokens, else ``second`` does.

    ``first`` is a kind that proposes given tokens; how long a match it asks for is among its own settings.
    """

    paradigm: ClassVar[str] = "ngram-before-model"
    kind: Literal["ngram-before-model"] = "ngram-before-model"
    first: AnyDrafter
    second: AnyDrafter
    least_tokens: Count = 1
    max_draft_tokens: Count = 8

    @property
    def default_name(self) -> str:
        """Name where none is given."""
        return f"{self.first.label}-before-{self.second.label}"

    def build(self, verifier: Verifier) -> Before:
        """Make the drafter of its parts."""
        from calibration.drafters.pairs import Before

        first, second = _parts(self.first, self.second, verifier)
        if not first.info.deterministic:
            rule = "first must propose given tokens (prompt-lookup, suffix, retrieval, trigram, memory)"
            raise CalibrationError(f"drafter '{self.label}': {rule}, got {self.first.paradigm}")
        told = {**_told(first, second), "least_tokens": self.least_tokens}
        shape = second.info.model_dump(exclude={"name", "paradigm", "max_draft_tokens", "settings"})
        info = _info(self, self.max_draft_tokens, shape, told)
        return Before(info, first, second, self.least_tokens)


class MergedTrees(DrafterSettings):
    """Both drafters draft, and one verification reads both drafts (TAPS).

    ``choose`` is ``both``: the trees are merged at their common root, nodes with the same tokens up to and with
    themselves are one; or ``confidence``: only the draft of the larger mean confidence is verified. Source: "TAPS:
    Task Aware Proposal Distributions for Speculative Sampling" (2026).
    """

    paradigm: ClassVar[str] = "merged"
    kind: Literal["merged"] = "merged"
    first: AnyDrafter
    second: AnyDrafter
    choose: Literal["both", "confidence"] = "both"
    max_draft_tokens: Count = 8

    @property
    def default_name(self) -> str:
        """Name where none is given."""
        word = "and" if self.choose == "both" else "or"
        return f"{self.first.label}-{word}-{self.second.label}"

    def build(self, verifier: Verifier) -> Merged:
        """Make the drafter of its parts."""
        from calibration.drafters.pairs import Merged

        first, second = _parts(self.first, self.second, verifier)
        given = [part.name for part in (first, second) if part.info.deterministic]
        if self.choose == "confidence" and given:
            rule = "choose = 'confidence' needs two drafters that have one"
            raise CalibrationError(f"drafter '{self.label}': {rule}, '{given[0]}' proposes given tokens")
        told = {**_told(first, second), "choose": self.choose}
        info = _info(self, self.max_draft_tokens, _sums(first.info, second.info), told)
        return Merged(info, first, second, self.choose)


class RetrievalFused(DrafterSettings):
    """A retrieved tree, pruned by a model and fused with the model's own chain (RASD).

    ``first`` retrieves (any kind that proposes given tokens), ``second`` is a causal LM. ``prune``: ``first-token``,
    branches stay whose first token is among the model's ``top`` most probable; or ``path``: nodes stay as long as the
    model gives their path at least ``min_probability``, for which it reads the tree once. Nodes that chain and tree
    share are one: they are fused along their longest common beginning. Source: "RASD: Retrieval-Augmented Speculative
    Decoding" (2025); how the two are fused is our reading.
    """

    paradigm: ClassVar[str] = "retrieval-fused"
    kind: Literal["retrieval-fused"] = "retrieval-fused"
    first: AnyDrafter
    second: AnyDrafter
    prune: Literal["first-token", "path"] = "first-token"
    top: Count = 8
    min_probability: Annotated[float, Field(gt=0, le=1)] = 0.01
    max_draft_tokens: Count = 8

    @property
    def default_name(self) -> str:
        """Name where none is given."""
        return f"{self.first.label}-fused-{self.second.label}"

    def build(self, verifier: Verifier) -> FusedDrafter:
        """Make the drafter of its parts."""
        from calibration.drafters.given import GivenDrafter
        from calibration.drafters.lanes import ModelDrafter
        from calibration.drafters.pairs import FusedDrafter

        first, second = _parts(self.first, self.second, verifier)
        for side, part, wanted in (("first", first, GivenDrafter), ("second", second, ModelDrafter)):
            if not isinstance(part, wanted):
                rule = (
                    "must propose given tokens" if side == "first" else "must be a causal LM that reads tokens alone"
                )
                raise CalibrationError(f"drafter '{self.label}': {side} {rule}, got {part.info.paradigm}")
        assert isinstance(first, GivenDrafter)
        assert isinstance(second, ModelDrafter)
        own = {
            key: getattr(self, key) for key in ("prune", "top" if self.prune == "first-token" else "min_probability")
        }
        shape = second.info.model_dump(exclude={"name", "paradigm", "max_draft_tokens", "settings"})
        info = _info(self, self.max_draft_tokens, shape, _told(first, second) | own)
        return FusedDrafter(
            info, first, second, self.top if self.prune == "first-token" else None, self.min_probability
        )


def _parts(first: DrafterSettings, second: DrafterSettings, verifier: Verifier) -> tuple[Drafter, Drafter]:
    """Build both parts; `CalibrationError` where they cannot be told apart."""
    if first.label == second.label:
        raise CalibrationError(f"drafters first and second must have different names, got '{first.label}' twice")
    return first.build(verifier), second.build(verifier)


def _told(first: Drafter, second: Drafter) -> dict[str, Any]:
    """Say what a drafter is made of."""
    parts = {"first": first.info, "second": second.info}
    return {side: info.model_dump(mode="json", exclude_none=True) for side, info in parts.items()}


def _sums(first: DrafterInfo, second: DrafterInfo) -> dict[str, Any]:
    """Describe two models that both run: parameters and layers add up, the rest where it is the same."""
    a, b = first.model_dump(), second.model_dump()
    added = ("parameters", "parameters_non_embedding", "layers")
    found = {key: None if None in (a[key], b[key]) else a[key] + b[key] for key in added}
    same = ("hidden_size", "heads", "kv_heads", "vocabulary", "dtype")
    for key in same:
        found[key] = a[key] if a[key] == b[key] or not b["layers"] else b[key] if not a["layers"] else None
    return {**found, "deterministic": first.deterministic and second.deterministic}


def _info(settings: DrafterSettings, depth: int, shape: dict[str, Any], told: dict[str, Any]) -> DrafterInfo:
    return DrafterInfo(
        name=settings.label, paradigm=settings.paradigm, max_draft_tokens=depth, settings=told, **shape
    )
