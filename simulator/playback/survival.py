"""Forecasts of how far a draft survives: hazards by depth, learned from the requests of other folds.

P(run > j | run >= j) = logistic(x b), with x made of what the text tells (`simulator.playback.survival`), the depth
j, what the drafter did of late, and products of them: discrete-time survival analysis (Cox 1972; Allison 1982). The
survival curve S_j = P(run >= j) is the product of these; its sum over j <= k is the expected accepted length of a
draft of k tokens, bonus excluded.

What the text of a request alone tells about drafting at each of its positions: matches, and how they fared.

Everything at position t is computed from the prompt and the first t output tokens: an engine knows it before the
round that starts there, for free. With the tokens known, a lookup can be scored after the fact at positions where it
was never asked (a shadow draft), which no drafter with a network allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from calibration.proposers.suffix import SuffixAutomaton
from calibration.traces import TraceSet
from simulator.playback.replay import SequenceTable
from simulator.playback.signals import logistic

FACTS = (
    "log_match",
    "match_of_3",
    "match_of_7",
    "agreement",
    "disagree",
    "hits",
    "streak",
    "occurrences",
    "position",
    "from_prompt",
)
"""Columns of `TextFacts.values`; see `_Reader.look`."""
_AGREED_TOKENS = 8
_FADE = 0.9
"""Weight of the past in the moving average of shadow hits, a token."""


@dataclass(frozen=True)
class TextFacts:
    """Facts at every position of the sequences served, numbered as `simulator.playback.replay` numbers them.

    `match` (positions): length of the longest suffix of prompt and output so far that occurred before. `values`
    (positions, `FACTS`). `text`: the token ids of all sequences, prompt and output, in a row; `end` (positions): how
    far it is known there; `source` (positions): where the latest earlier match goes on, -1 without a match.
    """

    match: Ints
    values: Floats
    text: Ints
    end: Ints
    source: Ints

    def path(self, places: Ints, longest: int) -> Ints:
        """Give the last token at `places`, and the `longest` that followed the latest match: (places, 1 + longest).

        A copy that reaches the end goes on with its own beginning; -1 where there is no match.
        """
        end, source = self.end[places, None], self.source[places, None]
        ahead = source + np.arange(longest) % np.maximum(end - source, 1)
        copied = np.where(source >= 0, self.text[np.maximum(ahead, 0)], -1)
        return np.concatenate([self.text[end - 1], copied], axis=1)


def text_facts(traces: TraceSet, sequences: SequenceTable, needed_by: str) -> TextFacts:
    """Read the text of `sequences`; about 10 microseconds a token.

    Raises `ReplayError` where prompts or outputs were recorded without their token ids.
    """
    prompts, outputs = (
        _token_ids(traces, sequences, name, needed_by) for name in ("prompt_token_ids", "output_token_ids")
    )
    matches, values, ends, sources = [], [], [], []
    text: list[int] = []
    for prompt, output in zip(prompts, outputs, strict=True):
        match, facts, source = read_text(prompt, output)
        matches.append(match)
        values.append(facts)
        sources.append(np.where(source >= 0, source + len(text), -1))
        ends.append(len(text) + len(prompt) + np.arange(len(output)))
        text += [*prompt, *output]
    columns = (np.concatenate(part) for part in (ends, sources))
    return TextFacts(np.concatenate(matches), np.concatenate(values), np.array(text, dtype=np.int64), *columns)


def read_text(prompt: Sequence[int], output: Sequence[int]) -> tuple[Ints, Floats, Ints]:
    """Give (longest earlier match, facts, where the latest match goes on) before each token of `output`.

    Shapes (T,), (T, `FACTS`) and (T,); places count from the beginning of the prompt, -1 without a match.
    """
    reader = _Reader(prompt)
    match, rows, source = [], [], []
    for token in output:
        match.append(reader.match)
        rows.append(reader.look())
        source.append(reader.source)
        reader.add(token)
    facts = np.array(rows, dtype=np.float64).reshape(-1, len(FACTS))
    return np.array(match, dtype=np.int64), facts, np.array(source, dtype=np.int64)


class _Reader:
    """A text that grows, and what is to be known of its end."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._text: list[int] = list(prompt)
        self._prompt = len(self._text)
        self._automaton = SuffixAutomaton(prompt, recent=True)
        self._trigrams: dict[tuple[int, ...], int] = {}
        for end in range(3, self._prompt + 1):
            self._count(end)
        self._hits, self._streak = 0.5, 0

    @property
    def match(self) -> int:
        """Length of the longest suffix that occurred before."""
        return self._automaton.match_length

    @property
    def source(self) -> int:
        """Where the latest earlier match goes on; -1 without one."""
        return self._automaton.match_end + 1 if self.match else -1

    def _count(self, end: int) -> None:
        key = tuple(self._text[end - 3 : end])
        self._trigrams[key] = self._trigrams.get(key, 0) + 1

    def look(self) -> tuple[float, ...]:
        """Give `FACTS`.

        Log of 1 + match length; whether it has three, seven tokens; how many tokens of what followed the match most
        recently and what followed it first agree (of 8; 1 where both are one place), and whether none does; a moving
        average of whether the token that followed the latest match was the next one, and for how many tokens without
        a break (log of 1 +); how often the last three tokens occurred before (log of 1 +); log of 1 + position;
        whether the match lies in the prompt.
        """
        end, match, automaton = len(self._text), self.match, self._automaton
        agreed, in_prompt = 0, False
        if match:
            recent = automaton.match_end + 1
            first = automaton.first_end[automaton.link[automaton.last]] + 1
            agreed, in_prompt = self._agreement(first, recent), recent < self._prompt
        seen = self._trigrams.get(tuple(self._text[end - 3 :]), 1) - 1 if end >= 3 else 0
        return (
            math.log1p(match),
            float(match >= 3),
            float(match >= 7),
            agreed / _AGREED_TOKENS,
            float(match > 0 and agreed == 0),
            self._hits,
            math.log1p(self._streak),
            math.log1p(seen),
            math.log1p(end - self._prompt),
            float(in_prompt),
        )

    def _agreement(self, first: int, recent: int) -> int:
        if first == recent:
            return _AGREED_TOKENS
        text, end, agreed = self._text, len(self._text), 0
        while agreed < _AGREED_TOKENS and recent + agreed < end and text[first + agreed] == text[recent + agreed]:
            agreed += 1
        return agreed

    def add(self, token: int) -> None:
        """Append a token, and score the shadow draft of the latest match by it."""
        if self.match:
            hit = self._text[self._automaton.match_end + 1] == token
            self._hits = _FADE * self._hits + (1 - _FADE) * hit
            self._streak = self._streak + 1 if hit else 0
        else:
            self._streak = 0
        self._text.append(token)
        self._automaton.append(token)
        if len(self._text) >= 3:
            self._count(len(self._text))


def _token_ids(traces: TraceSet, sequences: SequenceTable, name: str, needed_by: str) -> list[list[int]]:
    table = traces.sequences
    if name not in table.column_names:
        raise ReplayError(f"sequences.parquet: column '{name}': must be recorded for {needed_by}; it is missing")
    rows = pc.index_in(pa.array(sequences.ids), value_set=table["sequence_id"])
    column = table[name].combine_chunks().take(rows)
    if column.null_count:
        first = sequences.ids[int(np.argmax(pc.is_null(column).to_numpy(zero_copy_only=False)))]
        raise ReplayError(
            f"sequences.parquet: column '{name}': must be recorded for {needed_by}; missing for {column.null_count} "
            f"of {len(sequences)} sequences, first '{first}'"
        )
    found: list[list[int]] = column.to_pylist()
    return found


_RIDGE = 1.0
"""Penalty on half the squared coefficients, in hazards seen: keeps them finite where the facts decide."""
_TOKEN_RIDGE, _LARGEST_EFFECT = 3.0, 2.5
"""Penalty on the effect of a token, and how large it may be in log odds."""
_STEPS = 40
_ROWS = 60_000
"""Hazards that a fit looks at, at most: more of them no longer move the coefficients by what matters."""
RECENT_DECAY = 0.9
"""Weight of older rounds in the recent acceptance of a drafter, a round."""
RECENT_PRIOR = (2.0, 3.0)
"""Accepted and compared tokens that recent acceptance starts from, and always counts."""


def recent_acceptance(accepted: Floats, compared: Floats) -> Floats:
    """Give the log odds of faded counts of accepted over compared tokens, start values added."""
    hits, misses = accepted + RECENT_PRIOR[0], compared - accepted + RECENT_PRIOR[1] - RECENT_PRIOR[0]
    return np.asarray(np.log(hits / misses), dtype=np.float64)


@dataclass(frozen=True)
class Hazard:
    """A fitted hazard. `at_depth` (longest, columns of x): the coefficients of x at each depth, products included."""

    at_depth: Floats

    def curve(self, x: Floats) -> Floats:
        """Give S_1 .. S_longest for rows x (n, columns, constant first): shape (n, longest)."""
        return np.asarray(np.cumprod(logistic(x @ self.at_depth.T), axis=1), dtype=np.float64)


def fit_hazard(x: Floats, run: Ints, proposed: Ints, longest: int) -> Hazard:
    """Fit to rows x (constant first) where drafts ran `run` tokens deep of `proposed`; bonus excluded.

    A row counts once for each depth that its draft reached. A depth has its own constant (one for each of 0 to 3, one
    for each doubling beyond), and log(1 + depth) multiplies every column.
    """
    reach = np.minimum(np.minimum(run + 1, proposed), longest)
    rows = np.repeat(np.arange(len(x)), reach)
    first = np.concatenate(([0], np.cumsum(reach)[:-1]))
    depth = np.arange(len(rows)) - np.repeat(first, reach)
    if len(rows) > _ROWS:
        chosen = np.linspace(0, len(rows) - 1, _ROWS).astype(np.int64)
        rows, depth = rows[chosen], depth[chosen]
    step = _steps(longest)
    design = np.concatenate([x[rows], x[rows] * np.log1p(depth)[:, None], step[depth][:, 1:]], axis=1)
    b = fit_ridge(design, run[rows] > depth)
    width = x.shape[1]
    at_depth = b[:width] + b[width : 2 * width] * np.log1p(np.arange(longest))[:, None]
    at_depth[:, 0] += step[:, 1:] @ b[2 * width :]
    return Hazard(at_depth)


def fit_ridge(x: Floats, goes_on: NDArray[np.bool_]) -> Floats:
    """Fit P = logistic(x b) with a ridge penalty, by Newton's method with halved steps.

    le Cessie and van Houwelingen 1992. The penalised likelihood is strictly concave: it has one maximum, also without
    a row and where rows separate perfectly.
    """
    sign = np.where(goes_on, 1.0, -1.0)

    def loss(b: Floats) -> float:
        return float(np.logaddexp(0.0, -sign * (x @ b)).sum() + _RIDGE * (b @ b) / 2)

    b = np.zeros(x.shape[1])
    now = loss(b)
    for _ in range(_STEPS):
        p = logistic(x @ b)
        gradient = x.T @ (goes_on - p) - _RIDGE * b
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + _RIDGE * np.eye(len(b)), gradient)
        size = 1.0
        while (then := loss(b + size * step)) > now and size > 1e-6:
            size /= 2
        b, gained, now = b + size * step, now - then, then
        if gained < 1e-6:
            break
    return b


@dataclass(frozen=True)
class TokenEffects:
    """What tokens add to the log odds of a hazard: `own` of the one copied there, `before` of the one before it.

    Indexed by token id, -1 (the last place) for none. Shape (tokens + 1,) each.
    """

    own: Floats
    before: Floats

    def of(self, path: Ints) -> Floats:
        """Give what they add along `path` (rows, 1 + steps), the last known token first: shape (rows, steps)."""
        return np.asarray(self.own[path[:, 1:]] + self.before[path[:, :-1]])


def fit_effects(hazard: Hazard, x: Floats, path: Ints, run: Ints, proposed: Ints, tokens: int) -> TokenEffects:
    """Fit the effects of tokens to what `hazard` leaves open: first of the copied tokens, then of those before.

    One Newton step of a ridge penalty each, sum of (hit - P) over sum of P (1 - P) + penalty: shrunk to 0 where a
    token was seldom seen. Rows and `run`, `proposed` as in `fit_hazard`; `tokens`: how many ids there are.
    """
    steps = np.arange(len(hazard.at_depth))
    seen = steps < np.minimum(run + 1, proposed)[:, None]
    hit = steps < run[:, None]
    odds = x @ hazard.at_depth.T
    own = _effect(path[:, 1:], odds, hit, seen, tokens)
    before = _effect(path[:, :-1], odds + own[path[:, 1:]], hit, seen, tokens)
    return TokenEffects(own, before)


def _effect(path: Ints, odds: Floats, hit: NDArray[np.bool_], seen: NDArray[np.bool_], tokens: int) -> Floats:
    p = logistic(odds[seen])
    which = path[seen] % (tokens + 1)
    left = np.bincount(which, weights=hit[seen] - p, minlength=tokens + 1)
    weight = np.bincount(which, weights=p * (1 - p), minlength=tokens + 1)
    effect = np.clip(left / (weight + _TOKEN_RIDGE), -_LARGEST_EFFECT, _LARGEST_EFFECT)
    effect[-1] = 0.0
    return np.asarray(effect, dtype=np.float64)


def _steps(longest: int) -> Floats:
    """Give one-hot groups of depth: 0, 1, 2, 3, 4-7, 8-15, ..."""
    group = [depth if depth < 4 else 2 + (depth.bit_length() - 1) for depth in range(longest)]
    return np.eye(max(group) + 1)[group]
