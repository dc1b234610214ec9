"""Import a log of EAGLE-3 rounds with drafting times: fixed trees, and trees whose depth a learned policy chose.

Two CSV files. *Rounds* (one row a verification round): target, method, benchmark, question_id, step,
accepted_incl_bonus, dtime_ms, tree_tokens, tree_depth. *Questions*: target, method, benchmark, question_id,
new_tokens, wall_s, steps, with the method ``baseline`` for plain decoding.

What is not documented there was found by checking the numbers against each other:

* A round verifies first and drafts then: ``dtime_ms`` is the time of drafting alone, and row i's tree is what round
  i + 1 verifies. (Where the policy changes the depth, what was accepted never exceeds the *previous* row's tree, and
  exceeds that of its own row or of any other in one row of twelve.)
* A tree of ``tree_depth`` d accepts up to d + 1 tokens, bonus excluded: EAGLE runs its head once on what was accepted
  and then d times more, d + 1 passes in all.
* ``new_tokens`` is the sum of ``accepted_incl_bonus``; plain decoding gives one token less for the same text. So the
  prefill's token counts and the last bonus token does not.
* In ``mt_bench`` (two turns) rounds are those of one turn, tokens and seconds those of both; and accepted lengths
  and trees come from different turns: there they do not fit each other at any offset. Each is used by itself; a
  round is taken to have had a tree deep enough for what it accepted.
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

FORMAT = "ltd-eagle3-rounds"


@dataclass(frozen=True)
class LtdRounds:
    """The rounds of one question: accepted tokens (bonus excluded), and seconds and passes of each drafting."""

    accepted: Ints
    draft_s: Floats
    passes: Ints


@dataclass(frozen=True)
class LtdQuestion:
    """One question served with one method: tokens and seconds of all its turns, and the rounds of one turn.

    `rounds` is None for plain decoding.
    """

    method: str
    benchmark: str
    question: int
    new_tokens: int
    wall_s: float
    rounds: LtdRounds | None


def read_ltd(rounds_file: str | os.PathLike[str], questions_file: str | os.PathLike[str]) -> list[LtdQuestion]:
    """Read both files; `TraceError` where a question that drafted has no rounds, or rounds no question."""
    logged = _read_rounds(rounds_file)
    columns = read_columns(
        questions_file,
        {"method": "text", "benchmark": "text", "question_id": "count", "new_tokens": "count", "wall_s": "seconds"},
    )
    found = []
    for row, key in enumerate(zip(*(columns[name].tolist() for name in _KEY), strict=True)):
        method, benchmark, question = key
        rounds = logged.pop(key, None)
        if rounds is None and method != "baseline":
            raise TraceError(
                f"{questions_file}:{row + 2}: {method} {benchmark} {question} has no row in {rounds_file}"
            )
        tokens, wall = int(columns["new_tokens"][row]), float(columns["wall_s"][row])
        found.append(LtdQuestion(method, benchmark, question, tokens, wall, rounds))
    if logged:
        method, benchmark, question = next(iter(logged))
        raise TraceError(f"{rounds_file}: {method} {benchmark} {question} has no row in {questions_file}")
    return found


_KEY = ("method", "benchmark", "question_id")


def _read_rounds(file: str | os.PathLike[str]) -> dict[tuple[str, ...], LtdRounds]:
    columns = read_columns(
        file,
        {
            "method": "text",
            "benchmark": "text",
            "question_id": "count",
            "step": "count",
            "accepted_incl_bonus": "count",
            "dtime_ms": "seconds",
            "tree_depth": "count",
        },
    )
    found = {}
    for key, rows in groups(*(columns[name] for name in _KEY)).items():
        if (columns["step"][rows] != np.arange(len(rows))).any():
            raise TraceError(f"{file}: {key[0]} {key[1]} {key[2]}: step must count 0, 1, 2, ...")
        emitted = columns["accepted_incl_bonus"][rows]
        if (emitted < 1).any():
            raise TraceError(f"{file}: {key[0]} {key[1]} {key[2]}: accepted_incl_bonus must be at least 1")
        found[key] = LtdRounds(emitted - 1, columns["dtime_ms"][rows] / 1e3, columns["tree_depth"][rows] + 1)
    return found


def import_ltd(
    rounds_file: str | os.PathLike[str],
    questions_file: str | os.PathLike[str],
    method: str,
    *,
    verifier: str = "unknown",
    seed: int = 0,
) -> TraceSet:
    """Give the TraceSet of the rounds of `method`; sequences are called ``<benchmark>/<question>``.

    Replays what the method did: with draft length `max_draft_tokens` of the manifest every round drafts as deep as it
    was logged. Other draft lengths are an estimate. The first round's tree is not logged: its own row's is taken.
    """
    questions = read_ltd(rounds_file, questions_file)
    chosen = [question for question in questions if question.method == method and question.rounds is not None]
    if not chosen:
        known = {question.method for question in questions if question.rounds is not None}
        raise TraceError(f"method: must have rounds in {rounds_file}, got '{method}'{did_you_mean(method, known)}")
    requests, deepened, total = [], 0, 0
    for question in chosen:
        assert question.rounds is not None
        accepted, passes = question.rounds.accepted, question.rounds.passes
        verified = np.concatenate((passes[:1], passes[:-1]))
        deepened += int((accepted > verified).sum())
        total += len(accepted)
        rounds = Rounds(accepted, np.maximum(verified, accepted))
        requests.append(LoggedRequest(f"{question.benchmark}/{question.question}", question.benchmark, rounds))
    return trace_of_rounds(
        requests,
        Origin(verifier=verifier, drafter=method, paradigm="eagle3", temperature=0.0),
        FORMAT,
        Path(rounds_file),
        seed=seed,
        notes=(f"{deepened} of {total} rounds accepted more than the tree that is logged with them could hold",),
    )
