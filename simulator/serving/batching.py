"""Batching: in which order waiting requests are admitted, by name from ``[batching]``.

An order gives every request a rank when it arrives at a replica; the smallest rank goes first, equal ones in order of
submission. Preempted requests go before all others, as in vLLM. The head of the queue blocks it: nobody overtakes
because a smaller request would fit. An order sees what a server knows of a request when it arrives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import assert_never

import numpy as np

from simulator.playback.replay import SequenceTable
from simulator.scenario.fleet import (
    Batching,
    EarliestDeadline,
    FirstCome,
    OracleShortest,
    PriorityClasses,
    ShortestPredicted,
)
from simulator.workload import Request

Order = Callable[[Request], float]
"""Gives the rank of a request; it depends on nothing but the request, so that a queue can be kept sorted."""


def make_order(settings: Batching | None, sequences: SequenceTable) -> Order:
    """Give the order that a scenario names; first come, first served where it names none."""
    match settings:
        case ShortestPredicted():
            predicted = domain_means(sequences)
            return lambda request: predicted[request.sequence]
        case OracleShortest():
            return lambda request: float(request.output_tokens)
        case EarliestDeadline(default_s=default_s):
            last = default_s if default_s is not None else math.inf
            return lambda request: min(request.deadline_s, request.arrival_s + last)
        case PriorityClasses(ageing_s=ageing_s):
            if ageing_s is None:
                return lambda request: float(request.priority)
            # Class - waited / ageing_s, compared between two requests, does not depend on the moment.
            return lambda request: request.arrival_s + ageing_s * request.priority
        case FirstCome() | None:
            return lambda request: request.arrival_s
    assert_never(settings)


def domain_means(sequences: SequenceTable) -> list[float]:
    """Give, for every sequence, the mean recorded output of its domain in tokens."""
    domains, of = np.unique(np.array(sequences.domains), return_inverse=True)
    lengths = np.array(sequences.output_tokens, dtype=np.float64)
    means = np.bincount(of, weights=lengths, minlength=len(domains)) / np.bincount(of, minlength=len(domains))
    return [float(mean) for mean in means[of]]
