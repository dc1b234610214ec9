"""Prompt lookup as a proposer: a chain copied from the earliest earlier match of the last tokens.

Prompt lookup: draft by copying what followed the longest earlier match of the last tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calibration.proposers.protocol import Draft, refuse, whole


class NgramIndex:
    """A growing token sequence that proposes continuations of its own end (prompt lookup, n-gram speculation).

    The longest suffix of `ngram_max` down to `ngram_min` tokens that occurred before wins; of several
    occurrences the earliest, as vLLM and transformers choose; at most `max_draft_tokens` tokens that followed it
    are proposed. An index from n-gram to its first start makes a step O(ngram_max), not O(length).

    Source: Saxena, Prompt Lookup Decoding (2023); vLLM's n-gram proposer.
    """

    def __init__(
        self,
        tokens: Iterable[int] = (),
        *,
        ngram_max: int = 3,
        ngram_min: int = 1,
        max_draft_tokens: int = 20,
    ) -> None:
        if not 1 <= ngram_min <= ngram_max:
            raise ValueError(f"ngram_min: must be in [1, ngram_max = {ngram_max}], got {ngram_min}")
        if max_draft_tokens < 1:
            raise ValueError(f"max_draft_tokens: must be >= 1, got {max_draft_tokens}")
        self.ngram_max = ngram_max
        self.ngram_min = ngram_min
        self.max_draft_tokens = max_draft_tokens
        self._tokens: list[int] = []
        self._first: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens."""
        for token in tokens:
            # n-grams that end at the present end get a continuation only now, with the token that follows them.
            end = len(self._tokens)
            for n in range(self.ngram_min, min(self.ngram_max, end) + 1):
                self._first.setdefault(tuple(self._tokens[end - n : end]), end)
            self._tokens.append(token)

    def propose(self, draft_tokens: int | None = None) -> list[int]:
        """Give up to `draft_tokens` (and `max_draft_tokens`) tokens; empty where no n-gram matches."""
        limit = self.max_draft_tokens if draft_tokens is None else min(draft_tokens, self.max_draft_tokens)
        end = len(self._tokens)
        for n in range(min(self.ngram_max, end), self.ngram_min - 1, -1):
            start = self._first.get(tuple(self._tokens[end - n : end]))
            if start is not None:
                return self._tokens[start : start + limit]
        return []


def lookup_runs(
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    ngram_max: int = 3,
    ngram_min: int = 1,
    max_draft_tokens: int = 20,
) -> tuple[list[int], list[int]]:
    """Give (run lengths, proposal lengths) of prompt lookup at every position of `output`; bonus excluded.

    Exact for greedy and for sampled text alike: a proposal is a given string of tokens, so it is accepted as far
    as the trajectory agrees with it.
    """
    index = NgramIndex(prompt, ngram_max=ngram_max, ngram_min=ngram_min, max_draft_tokens=max_draft_tokens)
    runs, proposals = [], []
    for t, token in enumerate(output):
        draft = index.propose()
        run = 0
        while run < len(draft) and t + run < len(output) and draft[run] == output[t + run]:
            run += 1
        runs.append(run)
        proposals.append(len(draft))
        index.extend([token])
    return runs, proposals


@dataclass(frozen=True)
class LookupSettings:
    """Suffixes of `ngram_max` down to `ngram_min` tokens are looked up; see `calibration.proposers.lookup`."""

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
