"""Queueing laws at the limits where they are known in closed form."""

from __future__ import annotations

import numpy as np
from builders import manifest
from scenarios import scenario

from calibration.traces import TraceSet, make_table
from simulator import RunResult, simulate

STEP_S = 0.1
RATE = 2.0
REQUESTS = 8000
COSTS = {"verifier": {"kind": "linear", "base_s": STEP_S}}


def short_answers(rng: np.random.Generator, lengths: list[int]) -> TraceSet:
    """Sequences of independent random lengths; nothing to draft."""
    tokens = rng.choice(lengths, REQUESTS).tolist()
    sequences = {
        "sequence_id": [str(i) for i in range(REQUESTS)],
        "domain": ["chat"] * REQUESTS,
        "prompt_tokens": [1] * REQUESTS,
        "output_tokens": tokens,
        "finish_reason": ["stop"] * REQUESTS,
    }
    position = {"sequence_id": ["0"], "drafter": ["drafter"], "position": [0], "run_length": [0]}
    return TraceSet.build(
        manifest(),
        {"sequences": make_table("sequences", sequences), "positions": make_table("positions", position)},
    )


def replications(lengths: list[int], batch: int, number: int = 8) -> list[RunResult]:
    return [
        simulate(
            scenario(
                None,
                batch=batch,
                seed=seed,
                drafter=None,
                workload={"kind": "poisson", "rate_rps": RATE},
                costs=COSTS,
            ),
            short_answers(np.random.default_rng(seed), lengths),
        )
        for seed in range(number)
    ]


def agrees(values: list[float], expected: float) -> bool:
    """Whether the mean of independent values lies within three standard errors of what is expected."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return bool(abs(np.mean(values) - expected) <= 3 * error)


def test_one_slot_with_constant_steps_waits_as_pollaczek_and_khinchine_say() -> None:
    """M/G/1: mean wait = rate * E[S^2] / (2 * (1 - load)), S = output tokens * step time."""
    lengths = [1, 2, 7]
    service = STEP_S * np.array(lengths)
    load = RATE * service.mean()
    expected = RATE * (service**2).mean() / (2 * (1 - load))
    runs = replications(lengths, batch=1)
    waits = [
        float(np.mean(run.requests["start_s"].to_numpy() - run.requests["arrival_s"].to_numpy())) for run in runs
    ]
    assert agrees(waits, expected)
    assert np.std(waits, ddof=1) / np.sqrt(len(waits)) < 0.03 * expected, "the test would accept anything"
    busy = [1 - run.summary["idle_s"] / run.summary["duration"] for run in runs]
    assert agrees(busy, load)


def test_littles_law_holds_for_a_batched_engine() -> None:
    """L = rate * W, with L observed at the iterations and not derived from the requests' own times.

    Between two events the number in the system is that at the iteration's start plus the arrivals since: on average
    half of rate * duration.
    """
    differences = []
    for run in replications([1, 3, 8], batch=3):
        iterations = run.iterations
        duration = iterations["duration_s"].to_numpy()
        present = iterations["active"].to_numpy() + iterations["waiting"].to_numpy()
        # A prefill lists only the requests that it works on; those already decoding are present as well.
        decoding = np.where(iterations["kind"].to_numpy(zero_copy_only=False) == "prefill", 1, 0)
        ended = np.searchsorted(
            np.sort(run.requests["finish_s"].to_numpy()), iterations["start_s"].to_numpy(), "right"
        )
        started = np.searchsorted(run.requests["start_s"].to_numpy(), iterations["start_s"].to_numpy(), "left")
        present = present + decoding * (started - ended)
        observed = float(duration @ (present + RATE * duration / 2)) / run.summary["duration"]
        stay = float(np.mean(run.requests["finish_s"].to_numpy() - run.requests["arrival_s"].to_numpy()))
        differences.append(observed - RATE * stay)
        assert observed > 0.5
    assert agrees(differences, 0.0)
    assert np.std(differences, ddof=1) < 0.05
