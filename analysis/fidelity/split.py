"""Whose error it is: that of the mean end-to-end time of a condition, split into acceptance, step time and queue.

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
import pyarrow.compute as pc

from analysis.fidelity.counts import tokens_per_round
from calibration.common.errors import PacelineError
from calibration.measured import MeasuredRun
from calibration.traces import TraceSet
from simulator.pricing.costs import DraftPerRound, DraftPerStep, Prices
from simulator.pricing.make import make_prices
from simulator.scenario.engine import SerialPlacement
from simulator.scenario.scenario import Scenario

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
    seats = sum(
        (verifier["seconds"] + sum(row["seconds"] for row in drafts)) * verifier["sequences"]
        for verifier, drafts in steps_of(run)
    )
    return min(seats / behind, 1.0) if seats and behind > 0 else 1.0


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
