"""Suffix automaton drafting: copy what followed the longest earlier match of the end of the text.

A suffix automaton of a text has one state for each set of strings that end at the same places in it, at most two a
token, and is built in amortised O(1) a token (Blumer and others, 1985). Two of them serve here. The request's own
history grows with it: the suffix link of its last state is the longest suffix that occurred before. The corpus, other
texts given at construction, is fixed: a cursor follows the request through it, also in amortised O(1) a token.

The rule: the longer of the two matches drafts, one's own history where they are equally long. One's own history is
copied from the occurrence that the settings name; a copy that reaches the present end goes on with its own beginning,
as in LZ77. The corpus is walked from the match along the token that most often follows it there, the context growing
with every step; of equally frequent tokens the one seen first wins. A match at the ends of texts only, which nothing
follows, is shortened until something does.

Sources of the idea: Hu and others, "SAM Decoding: Speculative Decoding via Suffix Automaton" (2024); Oliaro and
others, "SuffixDecoding" (2024), which counts on suffix trees and bounds drafts by the match's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.common.errors import CalibrationError
from calibration.proposers.protocol import Draft, one_of, refuse, whole, within

_SEPARATOR = -1


@dataclass(frozen=True)
class SuffixSettings:
    """What a suffix proposer drafts.

    `min_match`: shorter matches propose nothing. `occurrence`: which earlier place of one's own history is copied,
    ``earliest`` (kept in O(1)) or ``recent``, which walks up the suffix links of every token: as far as shorter
    suffixes recur too. On text that walk is short and not measurable; only 4,000 times one and the same token cost 40
    microseconds a token. `length_factor`: drafts are at most that many times as long as the match; None for no such
    bound. `min_probability`: a corpus draft stops where the share of the match's occurrences that continue in this
    way falls below it.
    """

    min_match: int = 1
    occurrence: str = "recent"
    length_factor: float | None = None
    min_probability: float = 0.0
    max_draft_tokens: int = 20

    def __post_init__(self) -> None:
        """Refuse settings that cannot be, all faults in one `CalibrationError`."""
        rules = [
            whole("min_match", self.min_match),
            one_of("occurrence", self.occurrence, ("earliest", "recent")),
            within("min_probability", self.min_probability, 0, 1),
            whole("max_draft_tokens", self.max_draft_tokens),
        ]
        if self.length_factor is not None:
            rules.append(within("length_factor", self.length_factor, 0, 1000, open_low=True))
        refuse("suffix automaton", *rules)


class SuffixAutomaton:
    """The suffix automaton of a growing text.

    `following`: transitions by token of every state; `link`: its suffix link; `length`: its longest string;
    `first_end`: the index at which that first ends; `last`: the state of the whole text. With `recent`, `match_end`
    is where the longest suffix that occurred before most recently ended, at the price of a walk up the links of every
    extension.
    """

    def __init__(self, tokens: Iterable[int] = (), *, recent: bool = False) -> None:
        self.following: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.first_end = [-1]
        self.last = 0
        self.match_end = -1
        self._recent: list[int] | None = [-1] if recent else None
        for token in tokens:
            self.append(token)

    @property
    def match_length(self) -> int:
        """The length of the longest suffix that occurred before."""
        return self.length[self.link[self.last]] if self.last else 0

    def append(self, token: int) -> None:
        """Append one token; amortised O(1) without `recent`."""
        following, link, length = self.following, self.link, self.length
        end = length[self.last]
        new = self._state({}, end + 1, end)
        at = self.last
        while at >= 0 and token not in following[at]:
            following[at][token] = new
            at = link[at]
        link[new] = 0 if at < 0 else self._suffix(at, token)
        self.last = new
        longest = link[new]
        if self._recent is None:
            self.match_end = self.first_end[longest]
            return
        self.match_end = self._recent[longest]
        at = longest
        while at > 0:
            self._recent[at] = end
            at = link[at]

    def _state(self, following: dict[int, int], length: int, end: int) -> int:
        self.following.append(following)
        self.link.append(0)
        self.length.append(length)
        self.first_end.append(end)
        if self._recent is not None:
            self._recent.append(end)
        return len(self.link) - 1

    def _suffix(self, at: int, token: int) -> int:
        """Give the state of the longest string of `at` with `token` behind it, split off where it has none."""
        following, link, length = self.following, self.link, self.length
        old = following[at][token]
        if length[at] + 1 == length[old]:
            return old
        clone = self._state(dict(following[old]), length[at] + 1, self.first_end[old])
        if self._recent is not None:
            self._recent[clone] = self._recent[old]
        link[clone] = link[old]
        link[old] = clone
        while at >= 0 and following[at].get(token) == old:
            following[at][token] = clone
            at = link[at]
        return clone


class Corpus:
    """The suffix automaton of other texts, with the number of occurrences of every state; fixed, shared by requests.

    Building takes some 3 microseconds and half a kilobyte a token: for up to about a million tokens. Larger
    collections belong into a `calibration.proposers.retrieval`.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        automaton = SuffixAutomaton()
        for number, sequence in enumerate(sequences):
            if len(sequence) and min(sequence) < 0:
                raise CalibrationError(f"corpus: sequence {number} must be token ids >= 0, got {min(sequence)}")
            for token in sequence:
                automaton.append(token)
            automaton.append(_SEPARATOR)
        self.following, self.link, self.length = automaton.following, automaton.link, automaton.length
        self.occurrences = _occurrences(automaton)
        self.best = [self._most_frequent(state) for state in range(len(self.link))]

    def step(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """Give (state, length) of the longest suffix in the corpus after `token`; amortised O(1)."""
        while state and token not in self.following[state]:
            state = self.link[state]
            matched = self.length[state]
        if token in self.following[state]:
            return self.following[state][token], matched + 1
        return 0, 0

    def continued(self, state: int, matched: int) -> tuple[int, int]:
        """Give (state, length) of the longest suffix of this match that something follows."""
        while state and self.best[state] == _SEPARATOR:
            state = self.link[state]
            matched = self.length[state]
        return state, matched

    def walk(self, state: int, limit: int, min_probability: float) -> list[int]:
        """Give up to `limit` tokens from `state` on, at each step the one that most often follows."""
        tokens: list[int] = []
        total = self.occurrences[state]
        while len(tokens) < limit and self.best[state] != _SEPARATOR:
            token = self.best[state]
            state = self.following[state][token]
            if self.occurrences[state] < min_probability * total:
                break
            tokens.append(token)
        return tokens

    def _most_frequent(self, state: int) -> int:
        """Give the token that most often follows the strings of `state`; the separator where none does."""
        best, count = _SEPARATOR, 0
        for token, target in self.following[state].items():
            if token != _SEPARATOR and self.occurrences[target] > count:
                best, count = token, self.occurrences[target]
        return best


def _occurrences(automaton: SuffixAutomaton) -> list[int]:
    """Count where the strings of every state end: states of prefixes once, and all of their suffix links."""
    counts = [0] * len(automaton.link)
    for state in range(1, len(counts)):
        counts[state] = int(automaton.length[state] == automaton.first_end[state] + 1)
    for state in np.argsort(-np.array(automaton.length), kind="stable").tolist():
        if automaton.link[state] >= 0:
            counts[automaton.link[state]] += counts[state]
    return counts


class SuffixProposer:
    """Drafts chains from the longest match in one's own history or in a corpus; see the module for the rule."""

    def __init__(self, settings: SuffixSettings, corpus: Corpus | None = None) -> None:
        self._settings = settings
        self._tokens: list[int] = []
        self._own = SuffixAutomaton(recent=settings.occurrence == "recent")
        self._corpus = corpus
        self._state, self._matched = 0, 0

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens."""
        for token in tokens:
            self._tokens.append(token)
            self._own.append(token)
            if self._corpus is not None:
                self._state, self._matched = self._corpus.step(self._state, self._matched, token)

    def propose(self, draft_tokens: int) -> Draft:
        """Give the continuation of the longest match."""
        settings = self._settings
        own, state, matched = self._own.match_length, 0, 0
        if self._corpus is not None:
            state, matched = self._corpus.continued(self._state, self._matched)
        longest = max(own, matched)
        limit = min(draft_tokens, settings.max_draft_tokens)
        if settings.length_factor is not None:
            limit = min(limit, int(settings.length_factor * longest))
        if longest < settings.min_match or limit < 1:
            return Draft(())
        if self._corpus is not None and matched > own:
            return Draft(tuple(self._corpus.walk(state, limit, settings.min_probability)))
        return Draft(tuple(self._copy(self._own.match_end + 1, limit)))

    def _copy(self, start: int, limit: int) -> list[int]:
        """Give `limit` tokens from `start` on; past the present end, the copy itself is what is copied."""
        tokens = self._tokens[start : start + limit]
        period = len(tokens)
        while len(tokens) < limit:
            tokens.append(tokens[len(tokens) - period])
        return tokens
