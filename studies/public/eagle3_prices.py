"""What a round of Qwen3-8B with EAGLE-3 costs, fitted to logged questions, and the questions that are compared.

A logged round is drafting (its time is in the log) and everything else (verification, acceptance test, bookkeeping:
what is left of the question's wall time). Prices: *verify*, a plain decoding step; *pass*, one pass of the drafting
head; *round*, what a speculative round takes beyond both.

The verify step costs the same for one token, 60 and 151: at 28 ms a token an 8B model is far from a GPU's memory
bandwidth, the host launches its kernels one by one, and their number does not depend on tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.common.arrays import Floats
from calibration.traces import TraceSet
from calibration.traces.traceset import subset
from studies.public.ltd import LtdQuestion, import_ltd, read_ltd
from studies.public.runs import by_rank, table_path

VERIFIER = "Qwen3-8B"
_FOLDER = "eagle3-perstep-ltd"


@dataclass(frozen=True)
class RoundPrices:
    """Seconds of a plain step, of one drafting pass, and of a speculative round beyond verification and passes."""

    verify_s: float
    pass_s: float
    round_s: float

    def costs(self, speculates: bool) -> dict[str, Any]:
        """Give the ``[costs]`` of a scenario."""
        return {
            "overhead_s": self.round_s if speculates else 0.0,
            "verifier": {"kind": "linear", "base_s": self.verify_s},
            "drafter": {"kind": "linear", "base_s": self.pass_s, "charged": "per_step"},
        }


def fit_verify(plain: Sequence[LtdQuestion]) -> float:
    """Give the seconds of a plain step: wall time over steps, the prefill counted as one."""
    return sum(q.wall_s for q in plain) / sum(q.new_tokens + 1 for q in plain)


def fit_rounds(questions: Sequence[LtdQuestion], verify_s: float) -> RoundPrices:
    """Give the prices of drafting that follow from questions all of whose rounds are logged.

    Trees of one depth: every pass costs the same. Of several: seconds of drafting = a + pass_s * passes by least
    squares, and a belongs to the round. What is left of the wall time belongs to the round too, the prefill
    counted as one.
    """
    rounds = [q.rounds for q in questions if q.rounds is not None]
    passes = np.concatenate([one.passes for one in rounds]).astype(np.float64)
    draft_s = np.concatenate([one.draft_s for one in rounds])
    fixed_s, pass_s = 0.0, float(draft_s.sum() / passes.sum())
    if np.ptp(passes) > 0:
        pass_s, fixed_s = (float(value) for value in np.polyfit(passes, draft_s, 1))
    left_s = (sum(q.wall_s for q in questions) - float(draft_s.sum())) / (len(passes) + len(questions))
    return RoundPrices(verify_s, pass_s, max(0.0, left_s - verify_s + fixed_s))


@dataclass(frozen=True)
class Group:
    """Questions of one method and benchmark that are compared together."""

    method: str
    benchmark: str
    questions: tuple[LtdQuestion, ...]

    @property
    def new_tokens(self) -> Floats:
        """Tokens of each question."""
        return np.array([q.new_tokens for q in self.questions], dtype=np.float64)

    @property
    def wall_s(self) -> Floats:
        """Measured seconds of each question."""
        return np.array([q.wall_s for q in self.questions])

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Prompt (not known: 1) and output tokens of each question; the last bonus token is not in the counts."""
        return [(1, q.new_tokens + 1) for q in self.questions]

    @property
    def rounds(self) -> int:
        """Logged rounds of all questions."""
        return sum(len(q.rounds.accepted) for q in self.questions if q.rounds is not None)

    @property
    def whole(self) -> bool:
        """Whether the log holds every round of these questions, so that they replay."""
        return all(
            q.rounds is not None and int((q.rounds.accepted + 1).sum()) == q.new_tokens for q in self.questions
        )


def even(question: int) -> bool:
    """Say whether a question belongs to the half that prices are fitted to."""
    return question % 2 == 0


def odd(question: int) -> bool:
    """Say whether a question belongs to the half that is predicted."""
    return not even(question)


class Log:
    """The two tables, read once, and TraceSets of their rounds."""

    def __init__(self, data: Path) -> None:
        self._rounds = table_path(data, _FOLDER, "per_step.dev.csv.gz")
        self._questions = table_path(data, _FOLDER, "per_question.dev.csv")
        self.questions = read_ltd(self._rounds, self._questions)
        self._traces: dict[str, TraceSet] = {}

    def group(self, method: str, benchmark: str, keep: Callable[[int], bool] = lambda question: True) -> Group:
        """Give the questions of a method and a benchmark whose number `keep` accepts."""
        mine = (q for q in self.questions if (q.method, q.benchmark) == (method, benchmark) and keep(q.question))
        return Group(method, benchmark, tuple(mine))

    def traces(self, group: Group, recorded: Group) -> TraceSet:
        """Give the rounds of `recorded` in the order in which the questions of `group` replay them.

        Its own rounds for the same questions, where two turns were asked and one logged, the other goes on with
        blocks of it; else each question replays the one whose length has the same rank.
        """
        method = recorded.method
        if method not in self._traces:
            self._traces[method] = import_ltd(self._rounds, self._questions, method, verifier=VERIFIER)
        chosen = recorded.questions
        if recorded is not group:
            chosen = tuple(chosen[i] for i in by_rank(group.new_tokens.tolist(), recorded.new_tokens.tolist()))
        names = [f"{q.benchmark}/{q.question}" for q in chosen]
        return subset(self._traces[method], names, apart=not recorded.whole)
