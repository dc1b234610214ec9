"""Acceptance of a condition: what was predicted beside what the engine counted, a repeat each. Compared before time.

What an engine counts comes from its requests, else from its counters (Prometheus); accepted tokens by position from
its counters, else from the arrivals of tokens where these are its rounds (see `_by_arrivals`).

Whose error it is: that of the mean end-to-end time of a condition, split into acceptance, step time and queue.

E = W + P + D: a request waits W for its first token (mean TTFT: queue and prefill), then spends D in steps that
decode, and P waiting for prompts of others that are prefilled alone. m is measured, p predicted, t the tokens per
round, bonus included. Three factors, each with all others held:

    acceptance   E1 / E_m,  E1 = W_m + P_m + D_m (t_m / t_p) w        as many rounds as predicted, each as measured
    step time    E2 / E1,   E2 = a (W_m + P_m) + b D_m (t_m / t_p) w  the steps as measured, priced as predicted
    queue        E_p / E2                                  what is left: waiting, and which requests share a step

b = predicted over measured seconds of the measured steps that decode, a the same for those that prefill alone; w =
predicted seconds of the measured decode steps if they had drafted as many tokens a round as predicted, over those as
they were (1 where drafts are as long as predicted). (1 + acceptance)(1 + step time)(1 + queue) = E_p / E_m, exactly.
Acceptance and step times also change how many requests wait: that part of their effect counts as queue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.common.errors import PacelineError
from calibration.measured import MeasuredRun
from calibration.observe.prometheus import by_position, total
from calibration.traces import TraceSet
from simulator.pricing.costs import DraftPerRound, DraftPerStep, Prices
from simulator.pricing.make import make_prices
from simulator.scenario.fleet import SerialPlacement
from simulator.scenario.scenario import Scenario

COUNTS: dict[str, tuple[str, str]] = {
    "drafts": ("drafts", ""),
    "drafted_tokens": ("drafted tokens", "tokens"),
    "accepted_tokens": ("accepted tokens", "tokens"),
    "accepted_at": ("accepted at position", "of all drafts"),
    "tokens_per_round": ("tokens per round, bonus included", "tokens"),
}
"""Name of a count -> (label, unit); of ``accepted_at_2`` that before the number."""
NOT_COUNTED = "not counted by the engine"
MATERIAL = 0.10
"""Relative difference from which on a count is said first of all."""

_PREFIXES = ("vllm:", "llamacpp:")
_PREDICTED = {
    "drafts": "spec_decode_num_drafts",
    "drafted_tokens": "spec_decode_draft_tokens",
    "accepted_tokens": "spec_decode_accepted_tokens",
}
_COUNTERS = {"drafts": "drafts", "drafted_tokens": "draft_tokens", "accepted_tokens": "accepted_tokens"}
_LOST_AT_ENDS = 0.05
"""Share of accepted tokens that may lie past the ends of outputs, so that they never arrived."""


@dataclass(frozen=True)
class Count:
    """One count of a condition: predicted, and counted by the engine (None: it did not), a repeat each.

    `of`: how many things a share is of, 1 for a number; None for a mean, whose chance is not told.
    """

    name: str
    predicted: float
    counted: float | None
    of: float | None = 1.0

    @property
    def label(self) -> str:
        """What it counts, in words."""
        stem, _, place = self.name.rpartition("_")
        return f"{COUNTS[stem][0]} {place}" if stem in COUNTS else COUNTS[self.name][0]

    @property
    def unit(self) -> str:
        """Its unit."""
        return COUNTS[self.name if self.name in COUNTS else self.name.rpartition("_")[0]][1]

    @property
    def error(self) -> float | None:
        """Relative error: predicted / counted - 1; infinite where none was counted; None where nothing counted."""
        if self.counted is None:
            return None
        if self.counted == 0:
            return 0.0 if self.predicted == 0 else float("inf")
        return self.predicted / self.counted - 1

    @property
    def material(self) -> bool:
        """Whether prediction and count differ by more than `MATERIAL`, and by more than counts do by chance.

        Chance: three times the square root of the larger number.
        """
        if self.counted is None or self.error is None or abs(self.error) <= MATERIAL:
            return False
        if self.of is None:
            return True
        larger = max(self.predicted, self.counted) * self.of
        return bool(abs(self.predicted - self.counted) * self.of > 3 * larger**0.5)

    @property
    def told(self) -> str:
        """Prediction and count in words: ``drafts: 107 predicted, 14 counted``."""
        counted = NOT_COUNTED if self.counted is None else f"{number(self.counted)} counted"
        return f"{self.label}: {number(self.predicted)} predicted, {counted}"


def number(value: float) -> str:
    """Give a count: whole where it is, else to three digits behind a small whole part."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def counts(run: MeasuredRun, predicted: Mapping[str, Any]) -> tuple[Count, ...]:
    """Compare the counts of a condition, those of a prediction without speculation only where the engine drafted."""
    counted = counted_by(run)
    if _PREDICTED["drafts"] not in predicted and not counted.get("drafts"):
        return ()
    found = [Count(name, float(predicted.get(key, 0)), counted.get(name)) for name, key in _PREDICTED.items()]
    rates = predicted.get("spec_decode_per_position_acceptance_rates", ())
    own = positions_by(run, counted)
    for at in range(max(len(rates), len(own or ()))):
        rate = float(rates[at]) if at < len(rates) else 0.0
        mine = None if own is None else own[at] if at < len(own) else 0.0
        found.append(Count(f"accepted_at_{at + 1}", rate, mine, of=counted.get("drafts", 1.0)))
    told = float(predicted.get("tokens_per_round", 1.0))
    return (*found, Count("tokens_per_round", told, tokens_per_round(run), of=None))


def counted_by(run: MeasuredRun) -> dict[str, float]:
    """Give drafts, drafted and accepted tokens that the engine counted, a repeat; what it did not is absent."""
    repeats = run.manifest.repeats
    found = {}
    for name, counter in _COUNTERS.items():
        column = run.requests[name]
        if column.null_count < run.requests.num_rows:
            found[name] = float(pc.sum(column).as_py()) / repeats
            continue
        values = (total(run.manifest.counters, f"{p}spec_decode_num_{counter}_total") for p in _PREFIXES)
        told = next((value for value in values if value is not None), None)
        if told is not None:
            found[name] = told / repeats
    return found


def positions_by(run: MeasuredRun, counted: Mapping[str, float]) -> list[float] | None:
    """Give the share of drafts whose token at position 1, 2, .. was accepted; None where that was not counted."""
    drafts = counted.get("drafts")
    if not drafts:
        return None
    for prefix in _PREFIXES:
        kept = by_position(run.manifest.counters, f"{prefix}spec_decode_num_accepted_tokens_per_pos_total")
        if kept is not None:
            return [value / run.manifest.repeats / drafts for value in kept]
    accepted = _by_arrivals(run.requests, counted.get("accepted_tokens", 0.0) * run.manifest.repeats)
    if accepted is None:
        return None
    longest = int(accepted.max(initial=0))
    return [float((accepted >= at).sum()) / run.manifest.repeats / drafts for at in range(1, longest + 1)]


def _by_arrivals(requests: pa.Table, accepted: float) -> np.ndarray | None:
    """Give the tokens that every round accepted, as they arrived; None where arrivals are not rounds.

    They are where the tokens beyond the first of every arrival are those that the engine counted as accepted, up to
    what last rounds accepted past the ends of their outputs.
    """
    arrivals = [row for row in requests["emitted"].to_pylist() if row]
    if len(arrivals) < requests.num_rows:
        return None
    rounds = np.array([tokens - 1 for row in arrivals for tokens in row[1:]], dtype=np.int64)
    return rounds if 0 <= accepted - rounds.sum() <= _LOST_AT_ENDS * max(accepted, 1.0) else None


def tokens_per_round(run: MeasuredRun) -> float | None:
    """Give the tokens that a round of a sequence emitted, bonus included, rounds without a draft too.

    From the steps of rounds alone where steps were seen; else from the requests: (output - 1) tokens of each came
    from rounds, and each round gave what it accepted and one more. None where accepted tokens were not counted.
    """
    rounds = run.steps.filter(pc.equal(run.steps["operation"], "decode"))
    slots = float(pc.sum(rounds["sequences"]).as_py() or 0)
    if slots:
        return float(pc.sum(rounds["emitted_tokens"]).as_py()) / slots
    accepted = counted_by(run).get("accepted_tokens")
    if accepted is None:
        return None
    emitted = (float(pc.sum(run.requests["output_tokens"]).as_py()) - run.requests.num_rows) / run.manifest.repeats
    return emitted / (emitted - accepted) if emitted > accepted else None


def disagreements(found: Sequence[tuple[str, tuple[Count, ...]]]) -> list[str]:
    """Give a line for each of `found` (condition, counts) whose counts differ materially, the largest first."""
    lines = []
    for name, several in found:
        late = [one for one in several if one.material]
        if late:
            worst = max(_size(one) for one in late)
            lines.append((worst, f"{'; '.join(one.told for one in late)} ({name})"))
    return [line for _, line in sorted(lines, key=lambda pair: -pair[0])]


def _size(one: Count) -> float:
    """Give how far apart prediction and count are, as a ratio above 1."""
    low, high = sorted((one.predicted, one.counted or 0.0))
    return high / low if low > 0 else float("inf")


Row = Mapping[str, Any]
PARTS = ("acceptance", "step_time", "queue")


@dataclass(frozen=True)
class Split:
    """Relative errors of the mean end-to-end time: the whole, and the part of each cause; see the module.

    A part that cannot be told apart is None, and `queue` holds it too; `together` says why.
    """

    whole: float
    acceptance: float | None
    step_time: float | None
    queue: float
    together: str = ""


@dataclass(frozen=True)
class _Factors:
    """Predicted over measured seconds of measured steps, by kind, and what predicted drafting makes of them."""

    prefill: float
    decode: float
    drafting: float


def split_error(
    run: MeasuredRun,
    measured: Sequence[Mapping[str, Any]],
    predicted: Mapping[str, Any],
    scenario: Scenario,
    traces: TraceSet,
) -> Split | None:
    """Split the error of a condition; `scenario` has the prices that it was predicted with. None without times."""
    times = [(one.get("mean_ttft_ms"), one.get("mean_e2el_ms")) for one in measured]
    if not all(both[0] is not None and both[1] for both in times) or "mean_e2el_ms" not in predicted:
        return None
    first_token, whole = (float(np.mean([both[i] for both in times])) for i in (0, 1))
    decoding = (whole - first_token) * _share_in_rounds(run)
    waited = whole - decoding
    told, drafts = tokens_per_round(run), float(predicted.get("tokens_per_round", 1.0))
    factors, why = _factors(run, predicted, scenario, traces)
    missing = [] if told is not None else ["the engine counted no accepted tokens"]
    rounds = 1.0 if told is None else told / drafts * (1.0 if factors is None else factors.drafting)
    first = waited + decoding * rounds
    second = first
    if factors is None:
        missing.append(why)
    else:
        second = factors.prefill * waited + factors.decode * decoding * rounds
    error = float(predicted["mean_e2el_ms"])
    return Split(
        whole=error / whole - 1,
        acceptance=None if told is None else first / whole - 1,
        step_time=None if factors is None else second / first - 1,
        queue=error / second - 1,
        together="; ".join(missing),
    )


def _share_in_rounds(run: MeasuredRun) -> float:
    """Give D / (P + D): the share of the time behind first tokens that requests spend in steps that decode.

    Seconds of such steps times their sequences, over that time of all requests; 1 where no steps were seen.
    """
    table = run.requests
    behind = float(pc.sum(pc.subtract(table["finish_s"], table["first_token_s"])).as_py() or 0.0)
    max_num_seqs = sum(
        (verifier["seconds"] + sum(row["seconds"] for row in drafts)) * verifier["sequences"]
        for verifier, drafts in steps_of(run)
    )
    return min(max_num_seqs / behind, 1.0) if max_num_seqs and behind > 0 else 1.0


def _factors(
    run: MeasuredRun, predicted: Mapping[str, Any], scenario: Scenario, traces: TraceSet
) -> tuple[_Factors | None, str]:
    """Price the measured steps as they were predicted; or say why that cannot be done."""
    if run.steps.num_rows == 0:
        return None, "no steps were seen"
    placement = scenario.placement
    if scenario.replica is not None or not (placement is None or isinstance(placement, SerialPlacement)):
        return None, "steps of several devices are not compared"
    try:
        prices = make_prices(scenario, traces)
    except PacelineError as fault:
        return None, f"steps cannot be priced ({fault})"
    if prices.by_drafter:
        return None, "steps of several drafters are not compared"
    seconds: dict[bool, float] = {True: 0.0, False: 0.0}
    priced, otherwise = dict(seconds), 0.0
    stretch = _stretch(run, predicted)
    if placement is not None and placement.pad_drafts:
        stretch = 1.0  # verified as long as asked, whatever was drafted
    for verifier, drafts in steps_of(run):
        rounds = verifier["operation"] != "prefill"
        seconds[rounds] += verifier["seconds"] + sum(row["seconds"] for row in drafts)
        own, other = step_prices(prices, verifier, drafts, stretch)
        priced[rounds] += own
        otherwise += other if rounds else 0.0
    if not priced[True]:
        return None, "no step decoded"
    decode = priced[True] / seconds[True]
    prefill = priced[False] / seconds[False] if seconds[False] else decode
    return _Factors(prefill, decode, otherwise / priced[True]), ""


def _stretch(run: MeasuredRun, predicted: Mapping[str, Any]) -> float:
    """Give predicted over measured drafted tokens a round; 1 where either drafted nothing."""
    rows = [row for row, _ in steps_of(run) if row["operation"] == "decode"]
    slots, drafted = (sum(row[name] or 0 for row in rows) for name in ("sequences", "drafted_tokens"))
    predicted_tokens = float(predicted.get("drafted_tokens_per_round", 0.0))
    return predicted_tokens * slots / drafted if drafted and predicted_tokens else 1.0


def steps_of(run: MeasuredRun) -> Iterator[tuple[Row, list[Row]]]:
    """Give the verifier's row of every engine iteration, in order, with those of its drafter."""
    rows = sorted(run.steps.to_pylist(), key=lambda row: (row["repeat"], row["step"]))
    for _, iteration in groupby(rows, key=lambda row: (row["repeat"], row["step"])):
        together = list(iteration)
        drafts = [row for row in together if row["operation"] == "draft"]
        verified = [row for row in together if row["operation"] != "draft"]
        if len(verified) == 1:
            yield verified[0], drafts


def step_prices(prices: Prices, verifier: Row, drafts: Sequence[Row], stretch: float) -> tuple[float, float]:
    """Give the predicted seconds of a measured iteration: as it was, and with `stretch` times its drafted tokens."""
    sequences, new = int(verifier["sequences"]), int(verifier["new_tokens"])
    cached = int(verifier["context_tokens"]) + sequences  # as simulated: the last token of each counts as cached
    prompts, tokens, before = (int(verifier[f"prefill_{name}"]) for name in ("sequences", "tokens", "context_tokens"))
    fixed = prices.overhead_s + prices.changed_s(new + tokens)
    if not sequences:
        fixed += prices.prefill_s(prompts, tokens, before)
        return fixed, fixed
    if tokens:
        fixed += prices.added_prefill_s(prompts, tokens, before, new)

    def whole(times: float) -> float:
        verify_s = prices.verify_s(sequences, round(sequences + (new - sequences) * times), cached)[0]
        return fixed + verify_s + _draft_s(prices, verifier, drafts, times, verify_s)

    return whole(1.0), whole(stretch)


def _draft_s(prices: Prices, verifier: Row, drafts: Sequence[Row], times: float, verify_s: float) -> float:
    """Give the predicted seconds of the drafting of one iteration, whose drafts are `times` as long."""
    draft = prices.draft
    if draft is None:
        return 0.0
    sequences = int(verifier["sequences"])
    cached = int(verifier["context_tokens"]) + sequences
    drafted = (verifier["drafted_tokens"] or 0) * times
    if isinstance(draft, DraftPerRound):
        return float(draft.step.step_seconds(sequences, drafted if draft.tokens else sequences, cached))
    if not isinstance(draft, DraftPerStep):
        return draft.seconds(np.zeros(sequences, dtype=np.int64), np.zeros(sequences, dtype=np.int64), verify_s)[0]
    if drafts:
        shapes = ((row["sequences"], row["new_tokens"], row["context_tokens"] + sequences) for row in drafts)
        return times * float(sum(draft.step.step_seconds(*shape) for shape in shapes))
    steps = drafted / sequences
    return steps * float(draft.step.step_seconds(sequences, sequences, cached + steps * sequences / 2))
