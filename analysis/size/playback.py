"""Seconds that each recorded request takes in a batch kept full, by draft length, without simulating the schedule.

A round is drafted in lock step by the whole batch and verified at once; its time is divided evenly among the requests
in it, and a prompt is prefilled alone, as the simulator does and `analysis.speedup.speedup` counts. Rounds are those
of `analysis.common.rounds`: exact for greedy traces, exact expectations for sampled ones. Approximations: the rounds
of a request have its middle context on average, and the other requests of its batch the mean context. Prices that are
linear in context know no more of a batch than that; against the simulator see the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from analysis.common.rounds import recording, replay_rounds
from calibration.common.arrays import Floats
from calibration.common.errors import ReplayError
from calibration.traces import TraceSet
from simulator.pricing.costs import StepCost


@dataclass(frozen=True)
class Requests:
    """The recorded requests: their domains, prompt and output tokens, arrays of shape (requests)."""

    domains: tuple[str, ...]
    prompt_tokens: Floats
    output_tokens: Floats

    @classmethod
    def of(cls, traces: TraceSet) -> Requests:
        """Give those of `traces`, in its order."""
        table = traces.sequences
        return cls(
            tuple(table["domain"].to_pylist()),
            np.asarray(table["prompt_tokens"].to_numpy(zero_copy_only=False), dtype=np.float64),
            np.asarray(table["output_tokens"].to_numpy(zero_copy_only=False), dtype=np.float64),
        )


@dataclass(frozen=True)
class Drafted:
    """What one drafter does on every request: rounds by draft length k = 1 .. K, shape (K, requests).

    ``accepted`` and ``compared`` count its positions: P(a token drafted there is accepted), summed, and how many.
    """

    drafter: str
    rounds: Floats
    accepted: Floats
    compared: Floats


def played(traces: TraceSet, drafter: str, draft_tokens: int) -> Drafted:
    """Replay `drafter` at every draft length up to `draft_tokens`.

    Raises `ReplayError` where it was not recorded on every request.
    """
    recorded = recording(traces, drafter)
    if not (recorded.first < recorded.end).all():
        missing = int((recorded.first >= recorded.end).sum())
        raise ReplayError(f"drafter '{drafter}': must be recorded on every request, got {missing} without it")
    # Every round drafts, and its first draft is compared: depth 1 is at risk once a round.
    rounds = [replay_rounds(recorded, k).at_risk[:, 0] for k in range(1, draft_tokens + 1)]
    startable = recorded.startable
    matched = (recorded.match * startable).sum(axis=0, dtype=np.float64)
    return Drafted(drafter, np.stack(rounds), matched, startable.sum(axis=0).astype(np.float64))


@dataclass(frozen=True)
class Prices:
    """Step prices of one device: of the verifier's prefill and verification, and of a step of each drafter."""

    prefill: StepCost
    verify: StepCost
    draft: dict[str, StepCost]


def plain_seconds(requests: Requests, prices: Prices, batch: int) -> Floats:
    """Give the engine seconds of each request without speculation, shape (requests)."""
    return _seconds(requests, prices, requests.output_tokens - 1, None, 0, batch)


def drafted_seconds(requests: Requests, prices: Prices, drafted: Drafted, batch: int) -> Floats:
    """Give the engine seconds of each request by draft length 1 .. K, shape (K, requests)."""
    step = prices.draft[drafted.drafter]
    return np.stack([_seconds(requests, prices, r, step, k, batch) for k, r in enumerate(drafted.rounds, start=1)])


def round_seconds(prices: Prices, draft: StepCost | None, k: int, batch: int, context: Floats | float) -> Floats:
    """Give the seconds of a round of `batch` requests that draft k tokens; `context`: cached tokens, summed."""
    seconds = np.asarray(prices.verify.step_seconds(batch, batch * (k + 1), context), dtype=np.float64)
    for step in range(k):
        assert draft is not None
        seconds = seconds + draft.step_seconds(batch, batch, context + step * batch)
    return seconds


def extrapolated(prices: Prices, draft_tokens: int, batch: int, requests: Requests) -> bool:
    """Tell whether the price of some round lies outside of what was measured or tested."""
    context = float((requests.prompt_tokens + requests.output_tokens).mean()) * batch
    drafts = any(step.outside(batch, batch, context) for step in prices.draft.values())
    return drafts or prices.verify.outside(batch, batch * (draft_tokens + 1), context)


def _seconds(
    requests: Requests, prices: Prices, rounds: Floats, draft: StepCost | None, k: int, batch: int
) -> Floats:
    middle = requests.prompt_tokens + requests.output_tokens / 2
    others = float((rounds * middle).sum() / rounds.sum())
    share = round_seconds(prices, draft, k, batch, middle + (batch - 1) * others) / batch
    prefill = prices.prefill.step_seconds(np.ones_like(middle), requests.prompt_tokens, np.zeros_like(middle))
    return np.asarray(rounds * share + prefill)


def timed(traces: TraceSet, model: str, operation: str) -> bool:
    """Tell whether steps of `model` were timed."""
    rows = traces.timings
    mine = pc.and_(pc.equal(rows["model"], model), pc.equal(rows["operation"], operation))
    return bool(pc.any(mine).as_py())
