"""Speculation memory: recurring pieces of text are remembered, and a stopping rule learns online when to trust them.

This is our reading of a method that has not been published (AdaMemSpec: a memory of recurring token pieces with
counts and recency, and an online stop threshold from accepted over proposed).

The memory holds, behind every run of `min_order` to `max_order` tokens, what followed it: each following token x with
a weight w_x that grows by one at each occurrence and halves every `half_life` tokens. A draft grows token by token:
the longest remembered run that ends the text and the draft so far names its heaviest follower (the latest of equals),
whose confidence is w_x / (sum of w + `doubt`), so that what was seen once, long ago or with other endings counts
little. The hit score of a drafted token is the product of the confidences up to it. Texts given at construction are
remembered as if they had been read just before the request, with `corpus_weight` an occurrence.

The stopping rule drafts as long as the hit score is above a threshold theta, and learns which. At *every* committed
position the memory notes what it would propose at the lowest theta of the grid. Once the text has refuted or
completed a note, every theta is credited with what it would have earned there: accepted - `draft_cost` * proposed
tokens. Exponential moving averages of these earnings, the new one with weight `rate`, decide: the theta of the
largest rules, the largest of equal thetas. So a proposal is a function of the committed tokens alone although the
rule learns from success: it does not know where rounds began. Until more than `warm_up` notes are settled,
`first_threshold` rules. A grid that ends at 1 can learn to propose nothing, and learns again when that has become
wrong.

Asking at every position costs one draft of up to `max_draft_tokens` a committed token, so that an extension costs
about as much as a proposal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.proposers.protocol import Draft, refuse, whole, within


@dataclass(frozen=True)
class MemorySettings:
    """How a speculation memory remembers and when it trusts itself; see the module."""

    min_order: int = 1
    max_order: int = 4
    half_life: float = 500.0
    doubt: float = 0.5
    corpus_weight: float = 0.1
    thresholds: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    first_threshold: float = 0.2
    draft_cost: float = 0.1
    rate: float = 0.05
    warm_up: int = 16
    max_draft_tokens: int = 8

    def __post_init__(self) -> None:
        """Refuse settings that cannot be, all faults in one `CalibrationError`."""
        rules = [whole("min_order", self.min_order), whole("max_order", self.max_order)]
        if all(kept for kept, _ in rules):
            text = f"min_order: must be <= max_order = {self.max_order}, got {self.min_order}"
            rules.append((self.min_order <= self.max_order, text))
        rising = bool(self.thresholds) and all(
            a < b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False)
        )
        refuse(
            "memory",
            *rules,
            within("half_life", self.half_life, 0, 1e9, open_low=True),
            within("doubt", self.doubt, 0, 1e6, open_low=True),
            within("corpus_weight", self.corpus_weight, 0, 1e6, open_low=True),
            (rising, f"thresholds: must be a rising list, got {self.thresholds}"),
            *(within("thresholds", theta, 0, 1) for theta in self.thresholds),
            (
                self.first_threshold in self.thresholds,
                f"first_threshold: must be one of the thresholds, got {self.first_threshold}",
            ),
            within("draft_cost", self.draft_cost, 0, 1000),
            within("rate", self.rate, 0, 1, open_low=True),
            whole("warm_up", self.warm_up, 0),
            whole("max_draft_tokens", self.max_draft_tokens),
        )


class _Piece:
    """What followed one run of tokens: followers with (weight, when), the heaviest, and the sum of weights."""

    __slots__ = ("best", "followers", "total", "when")

    def __init__(self, other: _Piece | None = None) -> None:
        self.followers: dict[int, tuple[float, int]] = dict(other.followers) if other else {}
        self.best: int = other.best if other else -1
        self.total: float = other.total if other else 0.0
        self.when: int = other.when if other else 0

    def add(self, token: int, now: int, fade: float, amount: float = 1.0) -> None:
        """Remember that `token` followed at time `now`; only it can become the heaviest."""
        self.total = self.total * fade ** (now - self.when) + amount
        self.when = now
        weight, when = self.followers.get(token, (0.0, now))
        weight = weight * fade ** (now - when) + amount
        self.followers[token] = weight, now
        if self.best != token:
            rival, since = self.followers.get(self.best, (0.0, now))
            if weight >= rival * fade ** (now - since):
                self.best = token

    def confidence(self, now: int, fade: float, doubt: float) -> float:
        """Give the heaviest follower's weight over all of them and `doubt`, as of time `now`."""
        weight, when = self.followers[self.best]
        return weight * fade ** (now - when) / (self.total * fade ** (now - self.when) + doubt)


_Pieces = dict[tuple[int, ...], _Piece]


class Memory:
    """The pieces of a corpus; fixed, shared by requests. The orders are those of `settings`."""

    def __init__(self, settings: MemorySettings, sequences: Iterable[Sequence[int]] = ()) -> None:
        self.orders = (settings.min_order, settings.max_order)
        self.pieces: _Pieces = {}
        for sequence in sequences:
            row = tuple(sequence)
            for end, token in enumerate(row):
                for order in range(settings.min_order, min(settings.max_order, end) + 1):
                    self.pieces.setdefault(row[end - order : end], _Piece()).add(
                        token, 0, 1.0, settings.corpus_weight
                    )


@dataclass
class _Note:
    """A proposal of the past that the text has confirmed so far: its tokens, and what each theta proposed of it."""

    tokens: list[int]
    proposed: list[int]
    confirmed: int = 0


class MemoryProposer:
    """Drafts chains from the memory of a corpus and the request; a piece of the corpus is copied when it recurs."""

    def __init__(self, settings: MemorySettings, corpus: Memory | None = None) -> None:
        if corpus is not None and corpus.orders != (settings.min_order, settings.max_order):
            orders = (settings.min_order, settings.max_order)
            refuse(
                "memory", (False, f"orders: must be {corpus.orders}, as in the memory of the corpus, got {orders}")
            )
        self._settings = settings
        self._fade = 0.5 ** (1 / settings.half_life)
        self._corpus: _Pieces = corpus.pieces if corpus is not None else {}
        self._own: _Pieces = {}
        self._last: tuple[int, ...] = ()
        self._now = 0
        self._notes: list[_Note] = []
        self._settled = 0
        self._earnings = np.zeros(len(settings.thresholds))

    @property
    def threshold(self) -> float:
        """The theta that rules at present."""
        settings = self._settings
        if self._settled <= settings.warm_up:
            return settings.first_threshold
        return settings.thresholds[len(settings.thresholds) - 1 - int(np.argmax(self._earnings[::-1]))]

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens: settle what was noted before, remember, and note what comes next."""
        for token in tokens:
            self._settle(token)
            self._remember(token)
            self._note()

    def propose(self, draft_tokens: int) -> Draft:
        """Give the remembered continuation as far as its hit score is above the threshold."""
        tokens, scores = self._recall(min(draft_tokens, self._settings.max_draft_tokens), self.threshold)
        return Draft(tuple(tokens[: len(scores)]))

    def _remember(self, token: int) -> None:
        for order in range(self._settings.min_order, len(self._last) + 1):
            run = self._last[len(self._last) - order :]
            piece = self._own.get(run)
            if piece is None:
                piece = self._own[run] = _Piece(self._corpus.get(run))
            piece.add(token, self._now, self._fade)
        self._last = (*self._last, token)[-self._settings.max_order :]
        self._now += 1

    def _recall(self, limit: int, threshold: float) -> tuple[list[int], list[float]]:
        """Give up to `limit` tokens and their hit scores, as long as these are above `threshold`."""
        settings, last = self._settings, self._last
        tokens: list[int] = []
        scores: list[float] = []
        score = 1.0
        while len(tokens) < limit:
            piece = self._longest(last)
            if piece is None:
                break
            score *= piece.confidence(self._now, self._fade, settings.doubt)
            if score <= threshold:
                break
            tokens.append(piece.best)
            scores.append(score)
            last = (*last, piece.best)[-settings.max_order :]
        return tokens, scores

    def _longest(self, last: tuple[int, ...]) -> _Piece | None:
        """Give the piece of the longest remembered run that ends `last`."""
        for start in range(len(last) - self._settings.min_order + 1):
            run = last[start:]
            piece = self._own.get(run) or self._corpus.get(run)
            if piece is not None:
                return piece
        return None

    def _note(self) -> None:
        """Write down what would be proposed here, and how much of it under each threshold."""
        tokens, scores = self._recall(self._settings.max_draft_tokens, self._settings.thresholds[0])
        if tokens:
            proposed = [sum(score > theta for score in scores) for theta in self._settings.thresholds]
            self._notes.append(_Note(tokens, proposed))

    def _settle(self, token: int) -> None:
        """Confirm the open notes with `token`; credit the thresholds with those that it refutes or completes."""
        still = []
        for note in self._notes:
            hit = note.tokens[note.confirmed] == token
            note.confirmed += hit
            if hit and note.confirmed < len(note.tokens):
                still.append(note)
                continue
            proposed = np.array(note.proposed)
            earned = np.minimum(note.confirmed, proposed) - self._settings.draft_cost * proposed
            self._earnings += self._settings.rate * (earned - self._earnings)
            self._settled += 1
        self._notes = still
