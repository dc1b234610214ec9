"""Llama-3-8B with EAGLE-3 on an H100 at temperature 1, one request at a time: throughput from logged rounds.

Two runs on the same 80 questions of gsm8k: ``h100_eagle`` (speculative sampling on a draft tree) and ``h100_HSD``
(another acceptance test: hierarchical speculative decoding, also lossless). The log has no prefill; a question's
time is the sum of its rounds. Prices are means over the even questions of ``h100_eagle``; nothing of ``h100_HSD`` was
seen by the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.fidelity.table import Compared, Condition, Role, Source
from calibration.common.arrays import Floats
from calibration.traces import TraceSet
from calibration.traces.traceset import subset
from studies.public.hsd import HsdQuestion, import_hsd, read_hsd
from studies.public.runs import Served, by_rank, serve_one_by_one, table_path

NAME = "Llama-3-8B + EAGLE-3 on H100 (HSD)"
VERIFIER = "Llama-3-8B"
FITTED_RUN, OTHER_RUN = "h100_eagle", "h100_HSD"
STALLED = 2.0
"""A round that takes more than this many times its run's median is a stall of the machine, not of decoding."""
_FILE = ("hsd-eagle3-steps", "per_step.dev.csv.gz")


@dataclass(frozen=True)
class Half:
    """Questions of one run that are compared together, and the run's median round."""

    run: str
    name: str
    questions: tuple[HsdQuestion, ...]
    median_s: float

    @property
    def tokens(self) -> Floats:
        """Tokens that the rounds of each question emitted."""
        return np.array([float((q.accepted + 1).sum()) for q in self.questions])

    @property
    def seconds(self) -> Floats:
        """Measured seconds of each question; a stalled round counts as a median one."""
        return np.array([self._usual(q).sum() for q in self.questions])

    def _usual(self, question: HsdQuestion) -> Floats:
        return np.where(self.stalled(question), self.median_s, question.round_s)

    def stalled(self, question: HsdQuestion) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Say which rounds of a question stalled."""
        return np.asarray(question.round_s > STALLED * self.median_s)

    @property
    def rounds(self) -> int:
        """Rounds of all questions."""
        return sum(len(q.accepted) for q in self.questions)

    @property
    def accepted_length(self) -> float:
        """Tokens per round, bonus included."""
        return float(self.tokens.sum()) / self.rounds


def halves(questions: Sequence[HsdQuestion], run: str) -> dict[str, Half]:
    """Give the even, the odd and all questions of a run."""
    mine = tuple(q for q in questions if q.run == run)
    median_s = float(np.median(np.concatenate([q.round_s for q in mine])))
    return {
        "even": Half(run, "even questions", tuple(q for q in mine if q.question % 2 == 0), median_s),
        "odd": Half(run, "odd questions", tuple(q for q in mine if q.question % 2), median_s),
        "all": Half(run, "all questions", mine, median_s),
    }


def fit_costs(half: Half) -> dict[str, Any]:
    """Give the ``[costs]`` of a scenario: means over the rounds of `half` that did not stall.

    The acceptance test belongs to the verifier's step; drafting is charged once a round.
    """
    usual = [~half.stalled(q) for q in half.questions]
    verify_s, evaluate_s, draft_s = (
        float(np.concatenate([getattr(q, part)[keep] for q, keep in zip(half.questions, usual, strict=True)]).mean())
        for part in ("verify_s", "evaluate_s", "draft_s")
    )
    return {
        "overhead_s": 0.0,
        "verifier": {"kind": "linear", "base_s": verify_s + evaluate_s},
        "drafter": {"kind": "linear", "base_s": draft_s, "charged": "per_round"},
    }


def predict(traces: TraceSet, half: Half, recorded: Half, costs: dict[str, Any]) -> Served:
    """Simulate the questions of `half`, one at a time, on the rounds of `recorded` (others: by rank of length)."""
    info = traces.manifest.drafters[0]
    assert info.max_draft_tokens is not None
    order = by_rank(half.tokens.tolist(), recorded.tokens.tolist())
    rows = subset(traces, [str(recorded.questions[i].question) for i in order])
    lengths = [(1, int(tokens) + 1) for tokens in half.tokens]
    return serve_one_by_one(rows, info.name, info.max_draft_tokens, costs, lengths)


def compare_hsd_rounds(data: Path) -> tuple[Source, list[Condition]]:
    """Compare predicted with measured times of questions and rounds of both runs."""
    file = table_path(data, *_FILE)
    questions = read_hsd(file)
    run = {name: halves(questions, name) for name in (FITTED_RUN, OTHER_RUN)}
    traces = {name: import_hsd(file, name, verifier=VERIFIER) for name in run}
    costs = fit_costs(run[FITTED_RUN]["even"])
    eagle, other = run[FITTED_RUN], run[OTHER_RUN]
    cases: list[tuple[Half, Half, Role]] = [
        (eagle["even"], eagle["even"], "fit"),
        (eagle["odd"], eagle["odd"], "held-out"),
        (eagle["odd"], eagle["even"], "held-out"),
        (other["all"], other["all"], "held-out"),
        (other["odd"], other["even"], "held-out"),
    ]
    conditions = [
        _condition(half, recorded, role, predict(traces[half.run], half, recorded, costs))
        for half, recorded, role in cases
    ]
    return _source(run, costs), conditions


def _condition(half: Half, recorded: Half, role: Role, served: Served) -> Condition:
    replayed = recorded is half
    real, told = half.seconds / half.tokens * 1e3, served.decode_s / half.tokens * 1e3
    tokens = half.tokens.sum()
    compared = [
        Compared("output_throughput", tokens / half.seconds.sum(), tokens / served.decode_s.sum()),
        Compared("mean_tpot_ms", float(real.mean()), float(told.mean())),
        Compared("p99_tpot_ms", float(np.percentile(real, 99)), float(np.percentile(told, 99))),
        Compared(
            "step_ms", half.seconds.sum() / half.rounds * 1e3, served.decode_s.sum() / served.rounds.sum() * 1e3
        ),
    ]
    if not replayed:
        compared.append(Compared("spec_decode_acceptance_length", half.accepted_length, served.tokens_per_round))
    stalls = sum(int(half.stalled(q).sum()) for q in half.questions)
    return Condition(
        source=NAME,
        name=f"{half.run}, {half.name}" + ("" if replayed else f", acceptance of {recorded.name}"),
        role=role,
        repeats=1,
        compared=tuple(compared),
        labels={
            "drafter": half.run,
            "draft_tokens": "tree, 2 to 6 deep",
            "batch": "1",
            "domain": "gsm8k",
            "arrivals": "one at a time",
            "acceptance": "replayed" if replayed else "of other questions, by rank of length",
            "questions": str(len(half.questions)),
        },
        notes=(f"{stalls} of {half.rounds} rounds stalled and count as median rounds",) if stalls else (),
    )


def _source(run: dict[str, dict[str, Half]], costs: dict[str, Any]) -> Source:
    return Source(
        name=NAME,
        title="Llama-3-8B, EAGLE-3 draft trees, temperature 1",
        kind="published",
        device="NVIDIA H100",
        clock="wall time of the parts of each round",
        fitted_on=(
            f"even questions of {FITTED_RUN}: {costs['verifier']['base_s'] * 1e3:.2f} ms of verification and "
            f"acceptance test and {costs['drafter']['base_s'] * 1e3:.2f} ms of drafting a round"
        ),
        explained=tuple(_explained(run)),
        citation="hsd-eagle3-steps (Apache-2.0)",
    )


def _explained(run: dict[str, dict[str, Half]]) -> list[str]:
    eagle, other = run[FITTED_RUN]["all"], run[OTHER_RUN]["all"]
    found = []
    for half in (eagle, other):
        logged = np.array([q.round_s.sum() for q in half.questions]).sum()
        stalls = sum(int(half.stalled(q).sum()) for q in half.questions)
        found.append(
            f"{half.run}: {stalls} of {half.rounds} rounds took more than {STALLED:g} times the median (up to "
            f"{max(q.round_s.max() for q in half.questions):.1f} s) and make up "
            f"{1 - half.seconds.sum() / logged:.1%} of the logged time; they are counted as median rounds. No cost "
            "model foresees them."
        )
    found.append(
        f"A round of {OTHER_RUN} is {1 - other.median_s / eagle.median_s:.1%} shorter than one of {FITTED_RUN} "
        "(medians): the whole error of the run that the fit never saw."
    )
    odd, longest = run[FITTED_RUN]["odd"], max(run[FITTED_RUN]["odd"].questions, key=lambda q: len(q.accepted))
    rest = Half(odd.run, "", tuple(q for q in odd.questions if q is not longest), odd.median_s)
    found.append(
        f"Acceptance of other questions: question {longest.question} alone has {len(longest.accepted)} of the "
        f"{odd.rounds} rounds of the odd half of {FITTED_RUN}, at {float((longest.accepted + 1).mean()):.2f} tokens; "
        f"without it that half accepts {rest.accepted_length:.2f} instead of {odd.accepted_length:.2f} tokens a "
        f"round, the even half {run[FITTED_RUN]['even'].accepted_length:.2f}. Forty questions do not tell the "
        "acceptance of forty others."
    )
    return found
