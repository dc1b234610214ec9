"""The drafter of another vocabulary: step by step over a batch, and from every start at once.

A side keeps the drafter's cache and, every round, reads the committed text anew: what the new reading shares with the
cache stays, the rest is rolled back and fed again. From all starts at once, the reading of the longest committed text
is a trunk; a start shares a beginning of it and goes on with a tail of its own, all starts side by side in one pass.

From the tokens of a drafter with another vocabulary to tokens of the verifier, while the draft still grows.

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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.common.vocabularies import Correspondence, readable, runs
from calibration.drafters.given import proposal
from calibration.models.drafter import Drafter, Drafts, Opening, Proposal, Read, Side, Tap
from calibration.models.lane import Lane, pad_left
from calibration.models.sampling import distribution, entropy
from calibration.proposers.protocol import Draft
from calibration.traces.manifest import DrafterInfo

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


BRANCHES = 32
"""Starts that are drafted from side by side."""


@dataclass(frozen=True)
class ForeignDrafter:
    """A causal LM with another vocabulary; `known` are n-grams to begin with (``through`` ngrams)."""

    info: DrafterInfo
    model: Any
    words: Correspondence
    through: Literal["text", "ngrams"]
    known: Ngrams
    parts: tuple[Drafter, ...] = ()
    taps: tuple[Tap, ...] = ()

    @property
    def name(self) -> str:
        """Name in the manifest."""
        return self.info.name

    @property
    def limit(self) -> int:
        """Passes per round, and tokens proposed, at most."""
        return self.info.max_draft_tokens or 1

    def side(self, opening: Opening) -> Side:
        """Begin drafting for a batch."""
        return ForeignSide(self, opening)

    def step(self, batch: int, context_tokens: int, noise: torch.Generator) -> Callable[[], float]:
        """Give a function that runs one pass of the drafter over one of its own tokens once.

        A proposed token takes as many passes as its `draft_layers` have times the drafter's layers.
        """
        from calibration.drafters.timing import forward_step

        return forward_step(self.model, batch, 1, context_tokens)

    def begin(self, committed: Sequence[int]) -> Start | None:
        """Read a committed text; None where the drafter has nothing to go on from."""
        ids = self.words.to_drafter(committed)
        if ids is None:
            return None
        if self.through == "ngrams":
            return Start(ids, NgramTranslation(self.words, {**self.known, **self.words.ngrams(committed)}))
        last = runs(self.words.verifier, committed)[-1]
        pieces = [] if isinstance(last, int) else [self.words.verifier.pieces[i] or b"" for i in last]
        return Start(ids, TextTranslation(self.words, readable(b"".join(pieces))[0]))

    def drafts(self, read: Read, depth: int, generator: torch.Generator) -> Drafts:
        """Give the drafts from every start: greedy, packed side by side."""
        count, width = len(read.output_ids), min(depth, self.limit)
        text = [*read.prompt_ids, *read.output_ids]
        places = range(len(read.prompt_ids), len(text))
        starts = [self.begin(text[:place]) for place in places]
        live = [start for start in starts if start is not None]
        for begin in range(0, len(live), BRANCHES):
            _Packed(self, live[begin : begin + BRANCHES]).run(width)
        tokens: NDArray[np.int32] = np.full((count, width), -1, dtype=np.int32)
        layers: NDArray[np.int32] = np.zeros((count, width), dtype=np.int32)
        sure: NDArray[np.float32] = np.full((count, width), np.nan, dtype=np.float32)
        unsure = sure.copy()
        for row, start in enumerate(starts):
            if start is not None:
                found = start.proposed(width)
                size = len(found)
                tokens[row, :size] = found
                passes, needed = start.translation.settled.passes[:size], start.translation.settled.needed[:size]
                layers[row, :size] = np.diff([0, *passes]) * (self.info.layers or 0)
                sure[row, :size] = [math.prod(span) for span in _spans(start.sure, needed)]
                unsure[row, :size] = [math.fsum(span) for span in _spans(start.unsure, needed)]
        return Drafts(tokens, confidence=sure, entropy=unsure, layers=layers)


@dataclass
class Start:
    """One committed text as the drafter reads it (`ids`), and the draft that grows from it.

    ``sure``, ``unsure``: the drafter's largest probability and its entropy in nats at every drafted token.
    """

    ids: tuple[int, ...]
    translation: Translation
    drafted: list[int] = field(default_factory=list)
    sure: list[float] = field(default_factory=list)
    unsure: list[float] = field(default_factory=list)

    def grow(self, token: int, sure: float, unsure: float, wanted: int, limit: int) -> bool:
        """Take in a drafted token; True where another is needed."""
        self.drafted.append(token)
        self.sure.append(sure)
        self.unsure.append(unsure)
        self.translation.push(token)
        if len(self.drafted) == limit:
            self.translation.finish()
        return not self.translation.done and len(self.translation.settled.tokens) < wanted

    def proposed(self, wanted: int) -> list[int]:
        """Give up to `wanted` verifier tokens."""
        return self.translation.settled.tokens[:wanted]


def _spans(values: Sequence[float], needed: Sequence[int]) -> Iterator[Sequence[float]]:
    """Give, for every proposed token, the values of the drafted tokens that it needs and none before it did."""
    begin = 0
    for end in needed:
        yield values[begin:end]
        begin = max(begin, end)


def _read_off(logits: Tensor) -> list[tuple[int, float, float]]:
    """Give (token, probability, entropy) of the most probable token of each row [rows, vocabulary]."""
    q = distribution(logits)
    return list(zip(logits.argmax(-1).tolist(), q.amax(-1).tolist(), entropy(q).tolist(), strict=True))


class _Packed:
    """Starts of one text, drafted from side by side in one row of a lane."""

    def __init__(self, drafter: ForeignDrafter, starts: Sequence[Start]) -> None:
        self._drafter, self._starts = drafter, starts
        self._lane = Lane(drafter.model, 1)
        trunk = max((start.ids for start in starts), key=len)
        self._shared = [min(_common(trunk, start.ids), len(start.ids) - 1) for start in starts]
        size = max(self._shared)
        if size:
            self._lane.feed(torch.tensor([trunk[:size]], device=self._lane.device), last=1)
        self._owner = torch.full((size,), -1, device=self._lane.device)  # -1: the trunk, -2: padding
        self._trunk = torch.arange(size, device=self._lane.device)

    def run(self, wanted: int) -> None:
        """Draft until every start has `wanted` verifier tokens, or its draft ends."""
        going = list(range(len(self._starts)))
        fed = [self._starts[i].ids[self._shared[i] :] for i in going]
        begin = list(self._shared)
        limit = self._drafter.limit
        while going:
            found = _read_off(self._feed(going, fed, [begin[i] for i in going]))
            for i, tokens in zip(going, fed, strict=True):
                begin[i] += len(tokens)
            more = [self._starts[i].grow(*one, wanted, limit) for i, one in zip(going, found, strict=True)]
            going = [i for i, again in zip(going, more, strict=True) if again]
            fed = [(self._starts[i].drafted[-1],) for i in going]

    def _feed(self, going: Sequence[int], fed: Sequence[Sequence[int]], begin: Sequence[int]) -> Tensor:
        """Feed tokens behind what the starts `going` have; give the logits behind them [starts, vocabulary]."""
        device = self._lane.device
        tokens, real = pad_left(fed, device)
        width = tokens.shape[1]
        first = torch.tensor(begin, device=device)[:, None]
        position = (first + real.cumsum(1) - 1).clamp(min=0)
        branch = torch.tensor(going, device=device)[:, None].expand(-1, width)
        shared = torch.tensor([self._shared[i] for i in going], device=device)
        trunk = self._trunk < shared[:, None]
        older = branch[:, :1] == self._owner[len(self._trunk) :]
        before = torch.cat([trunk, older], 1)[:, None].expand(-1, width, -1).flatten(0, 1)
        mine, order = branch.flatten(), torch.arange(width, device=device).repeat(len(going))
        own = (mine[:, None] == mine) & (order[:, None] >= order) & real.flatten()
        self._owner = torch.cat([self._owner, torch.where(real, branch, -2).flatten()])
        logits = self._lane.forward(tokens.reshape(1, -1), position.reshape(1, -1), torch.cat([before, own], 1)[None])
        return logits[0].view(len(going), width, -1)[:, -1]


class ForeignSide:
    """The drafting side of a live loop: one row of a lane per text."""

    def __init__(self, drafter: ForeignDrafter, opening: Opening) -> None:
        self._drafter, self._opening = drafter, opening
        self._lane = Lane(drafter.model, len(opening.prompts))
        self._texts = [[*prompt, token] for prompt, token in zip(opening.prompts, opening.first, strict=True)]
        self._cached: list[list[int]] = [[] for _ in self._texts]

    def draft(self, gamma: int, generator: torch.Generator) -> Proposal:
        """Draft greedily until every row has `gamma` verifier tokens, or its draft ends."""
        starts = [self._drafter.begin(text) for text in self._texts]
        wanted = min(gamma, self._drafter.limit)
        fed = self._roll_back([() if start is None else start.ids for start in starts])
        going = [row for row, start in enumerate(starts) if start is not None]
        while going:
            found = _read_off(self._feed(fed))
            fed = [()] * len(starts)
            for row in list(going):
                start = starts[row]
                if start is not None and start.grow(*found[row], wanted, self._drafter.limit):
                    fed[row] = (start.drafted[-1],)
                else:
                    going.remove(row)
        drafts = [Draft(tuple(start.proposed(wanted)) if start else ()) for start in starts]
        return proposal(drafts, self._opening)

    def commit(self, emitted: Sequence[Sequence[int]], states: Mapping[Tap, Sequence[Tensor]]) -> None:
        """Take in the emitted tokens."""
        for text, row in zip(self._texts, emitted, strict=True):
            text.extend(row)

    def _roll_back(self, readings: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Keep in the cache what the new readings begin with; give what is to be fed, one token at least."""
        keep = [
            min(_common(cached, ids), max(len(ids) - 1, 0))
            for cached, ids in zip(self._cached, readings, strict=True)
        ]
        kept = self._lane.kept
        if kept.shape[1]:
            self._lane.forget(kept.cumsum(1) > torch.tensor(keep, device=kept.device)[:, None])
        self._cached = [cached[:count] for cached, count in zip(self._cached, keep, strict=True)]
        return [ids[count:] for ids, count in zip(readings, keep, strict=True)]

    def _feed(self, fed: Sequence[Sequence[int]]) -> Tensor:
        for cached, tokens in zip(self._cached, fed, strict=True):
            cached.extend(tokens)
        return self._lane.feed(*pad_left(fed, self._lane.device), last=1)[:, -1]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens with which both begin."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
