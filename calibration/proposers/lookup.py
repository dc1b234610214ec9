"""Prompt lookup as a proposer: a chain copied from the earliest earlier match of the last tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from calibration.proposers.checks import refuse, whole
from calibration.proposers.ngram import NgramIndex
from calibration.proposers.protocol import Draft


@dataclass(frozen=True)
class LookupSettings:
    """Suffixes of `ngram_max` down to `ngram_min` tokens are looked up; see `calibration.proposers.ngram`."""

    ngram_max: int = 3
    ngram_min: int = 1
    max_draft_tokens: int = 20

    def __post_init__(self) -> None:
        """Refuse settings that cannot be, all faults in one `CalibrationError`."""
        rules = [whole("ngram_max", self.ngram_max), whole("ngram_min", self.ngram_min)]
        if all(kept for kept, _ in rules):
            text = f"ngram_min: must be <= ngram_max = {self.ngram_max}, got {self.ngram_min}"
            rules.append((self.ngram_min <= self.ngram_max, text))
        refuse("prompt lookup", *rules, whole("max_draft_tokens", self.max_draft_tokens))


class LookupProposer:
    """Prompt lookup over one request; chains. An extension and a proposal take O(ngram_max)."""

    def __init__(self, settings: LookupSettings) -> None:
        self._index = NgramIndex(
            ngram_max=settings.ngram_max, ngram_min=settings.ngram_min, max_draft_tokens=settings.max_draft_tokens
        )

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens."""
        self._index.extend(tokens)

    def propose(self, draft_tokens: int) -> Draft:
        """Give the tokens that followed the earliest occurrence of the longest matching n-gram."""
        return Draft(tuple(self._index.propose(max(draft_tokens, 0))))
