"""From the rounds that an engine counted for a request to a run length at every position.

Rounds tell the run length where each of them started, and nothing in between. Positions of a TraceSet are
consecutive, so what lies in between is worked out from *match bits*: b_t = 1 where the drafter, drafting on, gets the
token x_t right. A round that starts at s, drafts d tokens and has a accepted says

    b_s .. b_{s+a-1} = 1,   and b_{s+a} = 0 if a < d.

After it the next one starts at s + a + 1. Hence every bit but one is known: b_{s+a} of a round whose whole draft was
accepted (a = d), which nobody looked at. That one is drawn, accepted with the conditional rate of depth d + 1
(`depth_rates`), or of the deepest depth seen where drafts never went so far. The run length at t is the number of
ones from t on, cut at the longest draft seen and at the end of the output.

Where a round started with fewer tokens accepted than drafted, or with the longest draft, this gives back what was
measured: rounds with the recorded draft lengths replay exactly. Elsewhere it is exact for a drafter whose next token
depends on the tokens alone (a draft model that drafts greedily), up to the drawn bits, and an estimate for a drafter
with a state of its own (EAGLE, heads) and for lookups, which might find another match there. Measured on public lists
that hold the run length at every position (SpecDecode-Bench, Llama-3.1-8B, 1,110 requests of three domains): from the
rounds of drafts of 3 or 5 tokens alone, tokens per round with shorter drafts come out 0.4 to 2.6% low for EAGLE and
within 0.6% for n-gram lookup, and with the recorded draft length exactly.

Logs of rounds, one row a round: the columns of a CSV file, and a TraceSet of what each round accepted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import TraceError
from calibration.importers.origin import Origin, prompt_source
from calibration.importers.reading import Collected
from calibration.traces import TraceSet

_UNSEEN = -1


@dataclass(frozen=True)
class Rounds:
    """Rounds of one request in order: tokens accepted (bonus excluded) and drafted. Round 1 starts at position 1."""

    accepted: Ints
    drafted: Ints


@dataclass(frozen=True)
class Placed:
    """Rounds with the positions where they start, each below the length of the output."""

    starts: Ints
    accepted: Ints
    drafted: Ints
    recorded: NDArray[np.bool_]


@dataclass
class Tally:
    """How much of an import is known, in positions unless it says otherwise.

    `starts_exact`: rounds started there and the run length is the measured one. `starts_open`: the whole draft was
    accepted and was shorter than the longest, so that the measured run is a lower bound. `inside_known`: skipped by
    the rounds; follows from the bits known. `inside_drawn`: skipped; depends on a bit that was drawn. `undrafted`: a
    round without a draft started there. `rounds_past_end`: rounds beyond the output. `requests_unplaced`: requests
    whose rounds without a draft stood at places unknown. `requests_shuffled`: those with rounds in unknown order.
    """

    requests: int = 0
    positions: int = 0
    starts_exact: int = 0
    starts_open: int = 0
    inside_known: int = 0
    inside_drawn: int = 0
    undrafted: int = 0
    rounds_past_end: int = 0
    requests_unplaced: int = 0
    requests_shuffled: int = 0

    def add(self, other: Tally) -> None:
        """Add the counts of `other`."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class Filled:
    """Run and proposal lengths at positions 1 .. T-1; `proposals` is None where the drafter always proposes."""

    runs: Ints
    proposals: Ints | None
    tally: Tally


def depth_rates(rounds: Iterable[Rounds]) -> Floats:
    """Give the conditional acceptance by depth 1, 2, ...: accepted there, of the tokens drafted there and reached.

    The product-limit estimate of Kaplan and Meier 1958: a draft that was accepted whole counts up to its length and
    leaves the deeper depths open. Empty where nothing was drafted.
    """
    pairs = list(rounds)
    accepted = np.concatenate([one.accepted for one in pairs] or [np.zeros(0, np.int64)])
    drafted = np.concatenate([one.drafted for one in pairs] or [np.zeros(0, np.int64)])
    rates = []
    for depth in range(1, int(drafted.max(initial=0)) + 1):
        reached = (drafted >= depth) & (accepted >= depth - 1)
        if not reached.any():
            break
        rates.append(float((accepted[reached] >= depth).mean()))
    return np.array(rates)


def place(rounds: Rounds, output_tokens: int, rng: Generator) -> Placed:
    """Find where the rounds of a request with `output_tokens` start.

    Tokens that no round emitted come one by one from rounds without a draft, which engines leave out of their counts;
    where these stood among the others is drawn, every order alike. Rounds past the end of the output are left out.
    """
    accepted, drafted = rounds.accepted, rounds.drafted
    lone = max(output_tokens - 1 - int((accepted + 1).sum()), 0)
    recorded = np.ones(len(accepted) + lone, dtype=bool)
    recorded[rng.choice(len(recorded), lone, replace=False)] = False
    spread = np.zeros((2, len(recorded)), dtype=np.int64)
    spread[:, recorded] = accepted, drafted
    starts = 1 + np.concatenate(([0], np.cumsum(spread[0] + 1)[:-1])) if len(recorded) else np.zeros(0, np.int64)
    inside = starts < output_tokens
    return Placed(starts[inside], spread[0][inside], spread[1][inside], recorded[inside])


def fill(
    rounds: Rounds, output_tokens: int, longest: int, rates: Floats, *, looks_up: bool, rng: Generator
) -> Filled:
    """Give run lengths at positions 1 .. output_tokens - 1 from the `rounds` of one request.

    `longest`: where run lengths are cut; `rates`: as `depth_rates` gives them. A drafter that `looks_up` proposes
    what it found: nothing in a round without a draft, and in between what was left of the last draft.
    """
    found = place(rounds, output_tokens, rng)
    bits, depth = _bits(found, output_tokens, looks_up)
    unseen = bits == _UNSEEN
    chance = rates[np.minimum(depth[unseen], len(rates)) - 1] if len(rates) else np.zeros(int(unseen.sum()))
    drawn = bits.copy()
    drawn[unseen] = rng.random(int(unseen.sum())) < chance
    runs = np.minimum(_runs(drawn == 1), longest)[1:]
    known = (np.minimum(_runs(bits == 1), longest) == np.minimum(_runs(bits != 0), longest))[1:]
    proposals = None
    if looks_up:
        runs, proposals = _proposed(found, runs, output_tokens)
        known[found.starts - 1] = True
    return Filled(runs, proposals, _tally(rounds, found, known, output_tokens))


def _bits(found: Placed, output_tokens: int, looks_up: bool) -> tuple[Ints, Ints]:
    """Give the match bits (`_UNSEEN` where nobody looked) and the depth at which an unseen one would be drafted."""
    bits = np.full(output_tokens, _UNSEEN, dtype=np.int64)
    depth = np.ones(output_tokens, dtype=np.int64)
    for start, accepted, drafted in zip(found.starts, found.accepted, found.drafted, strict=True):
        end = start + accepted
        bits[start:end] = 1
        if end < output_tokens:
            depth[end] = accepted + 1
            if accepted < drafted or (looks_up and drafted == 0):
                bits[end] = 0
    return bits, depth


def _runs(match: NDArray[np.bool_]) -> Ints:
    """Give, for every position, how many true values follow from there on."""
    index = np.arange(len(match))
    misses = np.append(np.flatnonzero(~match), len(match))
    return misses[np.searchsorted(misses, index)] - index


def _proposed(found: Placed, runs: Ints, output_tokens: int) -> tuple[Ints, Ints]:
    """Give run lengths, cut to the draft where a round started, and proposal lengths."""
    runs, left = runs.copy(), np.zeros_like(runs)
    for start, accepted, drafted in zip(found.starts, found.accepted, found.drafted, strict=True):
        skipped = min(accepted + 1, output_tokens - start)
        left[start - 1 : start - 1 + skipped] = drafted - np.arange(skipped)
        runs[start - 1] = min(runs[start - 1], drafted)
    return runs, np.maximum(runs, left)


def _tally(rounds: Rounds, found: Placed, known: NDArray[np.bool_], output_tokens: int) -> Tally:
    started = np.zeros(len(known), dtype=bool)
    started[found.starts - 1] = True
    draftless = np.zeros(len(known), dtype=bool)
    draftless[found.starts[found.drafted == 0] - 1] = True
    lone = int((~found.recorded).sum())
    return Tally(
        requests=1,
        positions=len(known),
        starts_exact=int((started & ~draftless & known).sum()),
        starts_open=int((started & ~draftless & ~known).sum()),
        inside_known=int((~started & known).sum()),
        inside_drawn=int((~started & ~known).sum()),
        undrafted=int(draftless.sum()),
        rounds_past_end=len(rounds.accepted) - int(found.recorded.sum()),
        requests_unplaced=int(lone > 0 and lone < len(found.starts)),
    )


def drafts_for(accepted: Ints, drafted_tokens: int, longest: int, rng: Generator) -> Ints | None:
    """Give draft lengths that add up to `drafted_tokens`, for rounds of which only the sum is known.

    Every draft has `longest` tokens but for some, drawn at random, that ended where they were accepted. None where no
    such lengths exist: between `accepted` (at least 1) and `longest` each.
    """
    least = np.maximum(accepted, 1)
    spare = longest - least
    missing = longest * len(accepted) - drafted_tokens
    if missing < 0 or (spare < 0).any() or missing > spare.sum():
        return None
    order = rng.permutation(len(accepted))
    taken = np.minimum(np.maximum(missing - (np.cumsum(spare[order]) - spare[order]), 0), spare[order])
    drafted = np.full(len(accepted), longest, dtype=np.int64)
    drafted[order] -= taken
    return drafted


def rounds_of(accepted: Sequence[int], drafted: Sequence[int]) -> Rounds:
    """Give the rounds of two lists."""
    return Rounds(np.array(accepted, dtype=np.int64), np.array(drafted, dtype=np.int64))


Kind = Literal["text", "count", "seconds"]
"""What a column holds: text; whole numbers >= 0; finite numbers >= 0, whatever their unit."""


@dataclass(frozen=True)
class LoggedRequest:
    """The rounds of one request in order; `name` and `domain` as they are to be called."""

    name: str
    domain: str
    rounds: Rounds


def read_columns(file: str | os.PathLike[str], kinds: Mapping[str, Kind]) -> dict[str, NDArray[Any]]:
    """Give the columns `kinds` of a CSV file (plain or .gz) as arrays; others in it are ignored.

    Raises `TraceError` with file, column, line and rule for what is missing or of another kind.
    """
    import pyarrow as pa
    from pyarrow import csv

    path = Path(file)
    if not path.is_file():
        raise TraceError(f"{path}: not found")
    types = {name: pa.string() for name in kinds}
    try:
        table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False))
    except (pa.ArrowInvalid, OSError) as fault:
        raise TraceError(f"{path}: not readable as CSV ({fault})") from None
    for name in kinds:
        if name not in table.column_names:
            raise TraceError(f"{path}: column '{name}' is missing; it has {', '.join(table.column_names)}")
    if table.num_rows == 0:
        raise TraceError(f"{path}: must hold at least one row, got none")
    return {name: _values(table[name].to_pylist(), kind, f"{path}", name) for name, kind in kinds.items()}


def _values(texts: list[str], kind: Kind, place: str, column: str) -> NDArray[Any]:
    if kind == "text":
        return np.array(texts, dtype=object)
    try:
        numbers = np.array(texts, dtype=np.float64)
    except ValueError:
        numbers = np.array([_number(text) for text in texts])
    wrong = ~(np.isfinite(numbers) & (numbers >= 0))
    rule = "a number >= 0"
    if kind == "count":
        wrong |= numbers != np.floor(np.where(wrong, 0, numbers))
        rule = "a whole number >= 0"
    if wrong.any():
        row = int(np.argmax(wrong))
        raise TraceError(f"{place}:{row + 2}: column '{column}': must be {rule}, got '{texts[row]}'")
    return numbers.astype(np.int64) if kind == "count" else numbers


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def groups(*keys: NDArray[Any]) -> dict[tuple[Any, ...], Ints]:
    """Give the rows of every combination of `keys`, in the order in which the combinations first appear."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row, key in enumerate(zip(*(column.tolist() for column in keys), strict=True)):
        found.setdefault(key, []).append(row)
    return {key: np.array(rows, dtype=np.int64) for key, rows in found.items()}


def trace_of_rounds(
    requests: Sequence[LoggedRequest],
    origin: Origin,
    import_format: str,
    file: Path,
    *,
    seed: int,
    unknown: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> TraceSet:
    """Give the TraceSet of logged rounds: each replays where it started, with the draft length that it had.

    An output is one token of the prefill and what the rounds emitted (accepted and bonus). What a draft between two
    rounds would have done is an estimate (see `calibration.importers.rounds`). Prompt lengths are not in such logs;
    they are written down as 1 token, and the manifest says so.
    """
    rng = np.random.default_rng(seed)
    longest = max(int(request.rounds.drafted.max()) for request in requests)
    rates = depth_rates(request.rounds for request in requests)
    collected, tally, domains = Collected(), Tally(), dict[str, int]()
    for request in requests:
        output = 1 + int((request.rounds.accepted + 1).sum())
        filled = fill(request.rounds, output, longest, rates, looks_up=True, rng=rng)
        collected.sequence(request.name, request.domain, 1, output, "unknown")
        collected.positions(request.name, origin.drafter, filled.runs, filled.proposals)
        tally.add(filled.tally)
        domains[request.domain] = domains.get(request.domain, 0) + 1
    manifest = origin.manifest(
        import_format,
        "round",
        longest_draft=longest,
        prompts=[prompt_source(file, domain, number) for domain, number in domains.items()],
        seed=seed,
        unknown=(
            "prompt lengths: not in the log; written down as 1 token",
            "what a draft between two logged rounds would have done: estimated",
            *unknown,
        ),
        notes=(
            f"{tally.starts_exact + tally.starts_open} of {tally.positions} positions are starts of rounds",
            *notes,
        ),
    )
    return TraceSet.build(manifest, collected.tables())
