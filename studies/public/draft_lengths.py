"""vLLM on an H100 with EAGLE-1 and EAGLE-3, one request at a time: draft lengths that the fit never saw.

A public thread (vllm-project/vllm#20780, Llama-3.1-8B-Instruct on MT-Bench) states the mean accepted length and the
TPOT for 2 to 7 drafted tokens. A round takes TPOT x accepted length. Two draft lengths give the price of a drafting
step and of a round; the others are predicted. Accepted lengths are those stated, turned into a made-up recording.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.fidelity.table import Compared, Condition, Role, Source
from calibration.common.errors import TraceError
from calibration.importers.aggregates import acceptance_law, synthesize
from calibration.importers.origin import Origin, prompt_source
from calibration.importers.rounds import groups, read_columns
from calibration.traces import TraceSet
from studies.public.runs import serve, table_path

NAME = "vLLM on H100, draft lengths (vllm#20780)"
THREAD = "vllm-project/vllm#20780"
DRAFTERS = ("EAGLE-1", "EAGLE-3")
FITTED = (2, 5)
"""Draft lengths that the prices are fitted to."""
_FILE = ("published-tables", "issue_tables.csv")
_REQUESTS, _TOKENS = 40, 512
"""Size of the made-up recording: enough rounds that its accepted length is the stated one to within 1%."""


@dataclass(frozen=True)
class Stated:
    """What the thread states of one drafter: by draft length, tokens per round (bonus included) and ms per token."""

    drafter: str
    accepted: dict[int, float]
    tpot_ms: dict[int, float]

    def round_ms(self, draft_tokens: int) -> float:
        """Give the time of a round: TPOT x accepted length."""
        return self.tpot_ms[draft_tokens] * self.accepted[draft_tokens]


def read_thread(file: Path) -> tuple[float, list[Stated]]:
    """Give the TPOT (ms) without speculation, and what is stated of each drafter; `TraceError` where rows lack."""
    columns = read_columns(
        file, {"thread": "text", "drafter": "text", "K": "text", "quantity": "text", "value": "seconds"}
    )
    found: dict[tuple[str, str], dict[int, float]] = {}
    for (thread, drafter, quantity), rows in groups(*(columns[n] for n in ("thread", "drafter", "quantity"))).items():
        if thread == THREAD:
            found[drafter, quantity] = {
                int(float(columns["K"][row])): float(columns["value"][row]) for row in rows.tolist()
            }
    wanted = [(name, what) for name in DRAFTERS for what in ("mean_accept_len_incl_bonus", "tpot_ms_bs1")]
    for drafter, quantity in (*wanted, ("none", "tpot_ms_bs1")):
        if (drafter, quantity) not in found:
            raise TraceError(f"{file}: {THREAD}: must state {quantity} of {drafter}, which is missing")
    plain = float(np.mean(list(found["none", "tpot_ms_bs1"].values())))
    return plain, [
        Stated(name, found[name, "mean_accept_len_incl_bonus"], found[name, "tpot_ms_bs1"]) for name in DRAFTERS
    ]


def rates(accepted: dict[int, float]) -> list[float]:
    """Give P(at least j tokens accepted), j = 1, 2, ...: what one more drafted token adds to the accepted length.

    Lengths are stated from two drafted tokens on; how their gain divides between the first and the second is taken as
    at a constant conditional rate a: a + a^2. It does not matter for draft lengths of two and more.
    """
    lengths = [accepted[k] for k in sorted(accepted)]
    first = (-1 + np.sqrt(1 + 4 * (lengths[0] - 1))) / 2
    return [float(first), float(first**2), *np.diff(lengths).tolist()]


def recording(stated: Stated, file: Path, seed: int = 0) -> TraceSet:
    """Give a made-up recording whose accepted lengths are the stated ones."""
    law = acceptance_law(rates(stated.accepted), f"{file}: {THREAD} {stated.drafter}")
    return synthesize(
        [(1, _TOKENS)] * _REQUESTS,
        [law] * _REQUESTS,
        "public thread",
        origin=Origin("Llama-3.1-8B-Instruct", stated.drafter, "eagle", temperature=0.0, device="NVIDIA H100"),
        seed=seed,
        rng=np.random.default_rng(seed),
        prompts=[prompt_source(file, "mt_bench", _REQUESTS)],
        domain="mt_bench",
    )


def fit_costs(plain_ms: float, stated: Stated) -> dict[str, Any]:
    """Give the ``[costs]`` of a scenario: the line through the rounds of the two fitted draft lengths."""
    short, long = FITTED
    step_ms = (stated.round_ms(long) - stated.round_ms(short)) / (long - short)
    rest_ms = stated.round_ms(short) - short * step_ms - plain_ms
    return {
        "overhead_s": max(rest_ms, 0.0) / 1e3,
        "verifier": {"kind": "linear", "base_s": plain_ms / 1e3},
        "drafter": {"kind": "linear", "base_s": step_ms / 1e3, "charged": "per_step"},
    }


def compare_draft_lengths(data: Path) -> tuple[Source, list[Condition]]:
    """Compare TPOT and speed-up at every draft length with their predictions."""
    file = table_path(data, *_FILE)
    plain_ms, drafters = read_thread(file)
    conditions = []
    for stated in drafters:
        traces, costs = recording(stated, file), fit_costs(plain_ms, stated)
        conditions += [_condition(stated, k, plain_ms, traces, costs) for k in sorted(stated.accepted)]
    source = Source(
        name=NAME,
        title="vLLM, Llama-3.1-8B-Instruct, EAGLE-1 and EAGLE-3, 2 to 7 drafted tokens",
        kind="published",
        device="NVIDIA H100",
        clock="wall time per output token (vllm bench serve)",
        fitted_on=f"drafts of {FITTED[0]} and {FITTED[1]} tokens, each drafter by itself",
        explained=tuple(_explained(drafters, conditions)),
        citation=f"{THREAD}; figures rounded to 0.01",
    )
    return source, conditions


def _condition(
    stated: Stated, draft_tokens: int, plain_ms: float, traces: TraceSet, costs: dict[str, Any]
) -> Condition:
    served = serve(
        {
            "drafter": {"name": stated.drafter},
            "stopping": {"policy": "fixed", "draft_tokens": draft_tokens},
            "engine": {"max_num_seqs": 1},
            "workload": {"kind": "closed", "concurrency": 1},
            "costs": costs,
        },
        traces,
    )
    told_ms = float(served.decode_s.sum() / (served.tokens - 1).sum()) * 1e3
    real_ms = stated.tpot_ms[draft_tokens]
    role: Role = "fit" if draft_tokens in FITTED else "held-out"
    return Condition(
        source=NAME,
        name=f"{stated.drafter}, {draft_tokens} drafted tokens",
        role=role,
        repeats=1,
        compared=(
            Compared("mean_tpot_ms", real_ms, told_ms),
            Compared("speedup", plain_ms / real_ms, plain_ms / told_ms),
        ),
        labels={
            "drafter": stated.drafter,
            "draft_tokens": str(draft_tokens),
            "batch": "1",
            "domain": "mt_bench",
            "arrivals": "one at a time",
            "acceptance": "stated mean length, made into a recording",
        },
    )


def _explained(drafters: list[Stated], conditions: list[Condition]) -> list[str]:
    found = []
    for stated in drafters:
        longest = max(stated.accepted)
        steps = np.diff([stated.round_ms(k) for k in sorted(stated.accepted)])
        worst = max(
            (c for c in conditions if c.labels["drafter"] == stated.drafter and c.role == "held-out"),
            key=lambda c: abs(c.compared[0].error),
        )
        found.append(
            f"{stated.drafter}: one more drafted token adds {steps.min():.2f} to {steps.max():.2f} ms to a stated "
            f"round (TPOT x accepted length); the last one, to {longest} tokens, {steps[-1]:.2f} ms. The largest "
            f"error, {worst.compared[0].error:+.1%}, is at {worst.labels['draft_tokens']} tokens."
        )
    found.append(
        "A drafting step runs the same layer at any depth and should cost the same; that the stated figures say "
        "otherwise beyond five tokens of EAGLE-3 is not explained."
    )
    return found
