"""Prompt lookup as a drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from calibration.drafters.info import DrafterSettings
from calibration.models.load import Verifier
from calibration.proposers.lookup import LookupSettings

if TYPE_CHECKING:
    from calibration.drafters.given import GivenDrafter


class PromptLookup(DrafterSettings):
    """Prompt lookup with suffixes of `ngram_max` down to `ngram_min` tokens; see `calibration.proposers.ngram`."""

    paradigm: ClassVar[str] = "prompt-lookup"
    kind: Literal["prompt-lookup"] = "prompt-lookup"
    ngram_max: int = LookupSettings.ngram_max
    ngram_min: int = LookupSettings.ngram_min
    max_draft_tokens: int = LookupSettings.max_draft_tokens

    def build(self, verifier: Verifier) -> GivenDrafter:
        """Make the drafter."""
        from calibration.drafters.given import GivenDrafter
        from calibration.proposers.lookup import LookupProposer

        sizes = LookupSettings(self.ngram_max, self.ngram_min, self.max_draft_tokens)
        info = self.made_of(ngram_max=self.ngram_max, ngram_min=self.ngram_min, match="earliest")
        info = info.model_copy(update={"max_draft_tokens": self.max_draft_tokens})
        return GivenDrafter(info, lambda: LookupProposer(sizes))
