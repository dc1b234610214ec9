"""Import a log of EAGLE-3 rounds under sampling with the times of their parts (hierarchical speculative decoding).

One row a round: run, question, turn, step, accept_length, draft_length, tree_verify_ms, eval_ms, update_draft_ms.
``accept_length`` excludes the bonus token. ``draft_length`` counts the root of the tree, which is a token already
emitted: a tree of draft_length 7 accepts up to 6. ``tree_verify_ms`` is the verifier's step, ``eval_ms`` the
acceptance test, ``update_draft_ms`` the drafting of the next tree.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import TraceError, did_you_mean
from calibration.importers.origin import Origin
from calibration.importers.rounds import LoggedRequest, Rounds, groups, read_columns, trace_of_rounds
from calibration.traces import TraceSet

FORMAT = "hsd-eagle3-rounds"


@dataclass(frozen=True)
class HsdQuestion:
    """The rounds of one question in one run: tokens accepted and drafted (bonus, root excluded), seconds of parts."""

    run: str
    question: int
    accepted: Ints
    drafted: Ints
    verify_s: Floats
    evaluate_s: Floats
    draft_s: Floats

    @property
    def round_s(self) -> Floats:
        """Seconds of each round, all parts."""
        return self.verify_s + self.evaluate_s + self.draft_s


def read_hsd(file: str | os.PathLike[str]) -> list[HsdQuestion]:
    """Read the rounds, question by question; `TraceError` with the place of what is wrong."""
    parts = ("tree_verify_ms", "eval_ms", "update_draft_ms")
    columns = read_columns(
        file,
        {
            "run": "text",
            "question": "count",
            "turn": "count",
            "step": "count",
            "accept_length": "count",
            "draft_length": "count",
            **dict.fromkeys(parts, "seconds"),
        },
    )
    if columns["turn"].any():
        raise TraceError(f"{file}: column 'turn': must be 0 throughout (one turn a question)")
    beyond = columns["accept_length"] >= columns["draft_length"]
    if beyond.any():
        row = int(np.argmax(beyond))
        raise TraceError(
            f"{file}:{row + 2}: accept_length must be below draft_length = {columns['draft_length'][row]}, which "
            f"counts the root, got {columns['accept_length'][row]}"
        )
    found = []
    for (run, question), rows in groups(columns["run"], columns["question"]).items():
        if (columns["step"][rows] != np.arange(len(rows))).any():
            raise TraceError(f"{file}: {run} question {question}: step must count 0, 1, 2, ...")
        verify_s, evaluate_s, draft_s = (columns[name][rows] / 1e3 for name in parts)
        accepted, drafted = columns["accept_length"][rows], columns["draft_length"][rows] - 1
        found.append(HsdQuestion(run, question, accepted, drafted, verify_s, evaluate_s, draft_s))
    return found


def import_hsd(
    file: str | os.PathLike[str], run: str, *, verifier: str = "unknown", domain: str = "gsm8k", seed: int = 0
) -> TraceSet:
    """Give the TraceSet of one run of the log; sequences are called by the number of their question.

    Run lengths are those of the one draw of the sampler that was logged.
    """
    questions = read_hsd(file)
    chosen = [question for question in questions if question.run == run]
    if not chosen:
        raise TraceError(
            f"run: must be in {file}, got '{run}'{did_you_mean(run, {question.run for question in questions})}"
        )
    return trace_of_rounds(
        [LoggedRequest(str(q.question), domain, Rounds(q.accepted, q.drafted)) for q in chosen],
        Origin(
            verifier=verifier, drafter=run, paradigm="eagle3", domain=domain, temperature=1.0, device="NVIDIA H100"
        ),
        FORMAT,
        Path(file),
        seed=seed,
    )
