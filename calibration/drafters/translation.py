"""From the tokens of a drafter with another vocabulary to tokens of the verifier, while the draft still grows.

A translation is told drafted tokens one by one and settles verifier tokens as soon as nothing that may follow can
change them. What is settled after n drafted tokens depends on the committed text and on those n alone, so a draft
that ends early is the beginning of one that goes on. No torch needed.

*Through text* (`TextTranslation`): the drafted bytes are encoded anew by the verifier's tokenizer, behind the
committed text. Words are settled once the next one begins; a character is complete or not there at all.

*Through n-grams* (`NgramTranslation`; OmniDraft's cache): the longest known n-gram of drafted tokens becomes the one
verifier token that it spells; a token not in any n-gram becomes the verifier's token of the same bytes; the draft
ends where there is none. OmniDraft inserts n-grams when a draft is rejected. Here they come from the committed text
(all its verifier tokens that several drafter tokens spell) and from a fixed corpus, so that what is proposed is a
function of the committed text alone; this is our reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from calibration.common.vocabularies import Correspondence, readable

Ngrams = Mapping[tuple[int, ...], int]


@dataclass
class Settled:
    """Verifier tokens of a draft so far; per token, the drafted tokens known when it was settled (``passes``) and
    those whose bytes it needs, counted from the draft's beginning (``needed``).
    """

    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)

    def add(self, token: int, passes: int, needed: int) -> None:
        """Take in one more token."""
        self.tokens.append(token)
        self.passes.append(passes)
        self.needed.append(needed)


class TextTranslation:
    """Re-tokenises the draft's text; ``before`` is the committed text, ``done`` says that the draft has ended."""

    def __init__(self, words: Correspondence, before: str) -> None:
        self.settled = Settled()
        self.done = False
        self._words, self._before = words, before
        self._ends: list[int] = []  # bytes of the draft after each drafted token
        self._waiting = b""
        self._begin = 0  # bytes already settled

    def push(self, token: int) -> None:
        """Take in one drafted token; a special token ends the draft."""
        piece = self._words.drafter.piece(token)
        if piece is None:
            self._ends.append(self._begin + len(self._waiting))
            self.finish()
            if not self._waiting and token in self._words.backward:
                self.settled.add(self._words.backward[token], len(self._ends), len(self._ends))
            return
        self._waiting += piece
        self._ends.append(self._begin + len(self._waiting))
        text, _ = readable(self._waiting)
        if "\ufffd" in text:  # no text can begin like this
            self._waiting = text[: text.index("\ufffd")].encode()
            self.finish()
        else:
            self._settle(text, len(text[: _last_word(text)].encode()))

    def finish(self) -> None:
        """Settle what is left: nothing more will be drafted."""
        if not self.done:
            self.done = True
            text, _ = readable(self._waiting)
            self._settle(text, len(text.encode()))

    def _settle(self, text: str, size: int) -> None:
        """Settle the tokens of `text` that end within its first `size` bytes."""
        if not size:
            return
        tokens = self._words.verifier.encode_after(self._before, text)
        if tokens is None:
            self.done = True
            return
        used = 0
        for token in tokens:
            width = len(self._words.verifier.pieces[token] or b"")
            if used + width > size:
                break
            used += width
            needed = next(i for i, end in enumerate(self._ends, 1) if end >= self._begin + used)
            self.settled.add(token, len(self._ends), needed)
        self._begin += used
        done = self._waiting[:used]
        self._before += done.decode(errors="ignore")
        self._waiting = self._waiting[used:]
        if not readable(done)[1]:
            self.done = True  # a token that ends inside a character: what is left cannot be encoded


class NgramTranslation:
    """Merges drafted tokens by known n-grams; ``longest`` is the longest key of `ngrams`."""

    def __init__(self, words: Correspondence, ngrams: Ngrams) -> None:
        self.settled = Settled()
        self.done = False
        self._words, self._ngrams = words, ngrams
        self._begun = {key[:size] for key in ngrams for size in range(1, len(key))}
        self._waiting: list[int] = []
        self._pushed = 0

    def push(self, token: int) -> None:
        """Take in one drafted token; a special token ends the draft."""
        self._pushed += 1
        if self._words.drafter.piece(token) is None:
            self.finish()
            if not self._waiting and token in self._words.backward:
                self.settled.add(self._words.backward[token], self._pushed, self._pushed)
            return
        self._waiting.append(token)
        self._settle(last=False)

    def finish(self) -> None:
        """Settle what is left: nothing more will be drafted."""
        if not self.done:
            self._settle(last=True)
            self.done = True

    def _settle(self, *, last: bool) -> None:
        while self._waiting and (last or tuple(self._waiting) not in self._begun):
            size, token = self._longest()
            if token is None:
                self.done = True
                return
            del self._waiting[:size]
            self.settled.add(token, self._pushed, self._pushed - len(self._waiting))

    def _longest(self) -> tuple[int, int | None]:
        for size in range(len(self._waiting), 1, -1):
            if (key := tuple(self._waiting[:size])) in self._ngrams:
                return size, self._ngrams[key]
        return 1, self._words.direct.get(self._waiting[0])


Translation = TextTranslation | NgramTranslation


def _last_word(text: str) -> int:
    """Give where the last word of `text` begins: its last blank behind something else; 0 where there is none."""
    for index in range(len(text) - 1, 0, -1):
        if text[index].isspace() and not text[index - 1].isspace():
            return index
    return 0
