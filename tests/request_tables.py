"""Traffic on which it is known which drafter is best: traces, prices, and tables of what requests cost."""

from __future__ import annotations

import numpy as np
from scenarios import DRAFT, LINEAR, random_runs
from several import several

from analysis.routing.served import Price, Priced, RequestTable
from calibration.traces import TraceSet

PRICES = Priced(Price("made up", "assumed", "of tests"), {"overhead_s": 0.002, "verifier": LINEAR, "drafter": DRAFT})


def table_of(costs: dict[str, tuple[float, ...]], copies: int) -> RequestTable:
    """A table in which every request of a domain takes so many seconds with each drafter; ten tokens each."""
    domains = tuple(domain for domain in costs for _ in range(copies))
    seconds = np.array([costs[domain] for domain in domains])
    number = len(domains)
    return RequestTable(
        tuple("abcdef"[: seconds.shape[1]]),
        tuple(f"request-{i}" for i in range(number)),
        domains,
        np.full(number, 11.0),
        seconds,
        seconds,
        seconds,
        np.full(number, 10.0),
        4,
    )


FLAT = {"kind": "linear", "base_s": 1.0}
ROUNDS_ONLY = Priced(
    Price("rounds", "assumed", "every round costs a second, drafts nothing"),
    {"overhead_s": 0.0, "verifier": FLAT, "drafter": {"kind": "linear", "base_s": 0.0}},
)
HOMES = {"coder": "code", "poet": "poems"}


def specialised(requests: int = 12) -> TraceSet:
    """Specialists accept everything at home and nothing elsewhere; of the generalist's drafts one is right.

    Requests of 41 tokens (a few of 37), alternately code and poems: 40 after the first are 10 rounds of draft 3 with
    a specialist at home, 40 away, and 20 with the generalist (36: 9, 36 and 18).
    """
    lengths = [41 if i % 3 else 37 for i in range(requests)]
    all_right, none, one = (
        [[n - 1 - t for t in range(n)] for n in lengths],
        [[0] * n for n in lengths],
        [[1] * (n - 1) + [0] for n in lengths],
    )

    def at(parity: int) -> list[list[int]]:
        return [(all_right if i % 2 == parity else none)[i] for i in range(requests)]

    return several({"both": one, "coder": at(0), "poet": at(1)}, domains=("code", "poems"))


def two_kinds(requests: int = 40, *, seed: int = 0) -> TraceSet:
    """Drafter a is right nine times in ten on code and one in ten on chat, b the other way; prompts tell which."""
    rng = np.random.default_rng(seed)
    runs = {
        name: [random_runs(rng, 30, alpha=0.9 if i % 2 == own else 0.1) for i in range(requests)]
        for own, name in enumerate(("a", "b"))
    }
    prompts = [(rng.integers(0, 30, 15) + 100 * (1 + i % 2)).tolist() for i in range(requests)]
    return several(runs, domains=("code", "chat"), prompts=prompts, felt={"a": 0.5, "b": 0.5})
