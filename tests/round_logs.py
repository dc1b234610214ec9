"""Small logs of rounds, written as their CSV files, with times that follow from known prices."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

VERIFY_S, PASS_S, ROUND_S = 0.020, 0.002, 0.005
"""Prices of the made-up log: a plain step, a drafting pass, and what a speculative round takes beyond both."""

Rounds = Sequence[tuple[int, int]]
"""Per round: tokens accepted (bonus included), and the depth of the tree that is drafted after it."""


def write_ltd(
    folder: Path, questions: dict[tuple[str, str, int], Rounds], unlogged_tokens: int = 0
) -> tuple[Path, Path]:
    """Write both files of an LTD log and a plain run of every question; give (rounds, questions).

    `unlogged_tokens`: of another turn, added to the tokens of every question (and seconds at 3 tokens a round).
    """
    rounds = ["target,method,benchmark,question_id,step,accepted_incl_bonus,dtime_ms,tree_tokens,tree_depth"]
    totals = ["target,method,benchmark,question_id,new_tokens,wall_s,steps,model_id"]
    for (method, benchmark, question), logged in questions.items():
        for step, (emitted, depth) in enumerate(logged):
            rounds.append(
                f"T,{method},{benchmark},{question},{step},{emitted},{1e3 * PASS_S * (depth + 1)},59,{depth}"
            )
        passes = sum(depth + 1 for _, depth in logged)
        wall_s = (len(logged) + 1) * (VERIFY_S + ROUND_S) + passes * PASS_S
        tokens = sum(emitted for emitted, _ in logged)
        wall_s += unlogged_tokens / 3 * (VERIFY_S + ROUND_S + 9 * PASS_S)
        totals.append(f"T,{method},{benchmark},{question},{tokens + unlogged_tokens},{wall_s},{len(logged)},m")
    for benchmark, question in dict.fromkeys(key[1:] for key in questions):
        tokens = next(
            sum(e for e, _ in logged) for key, logged in questions.items() if key[1:] == (benchmark, question)
        )
        tokens += unlogged_tokens
        totals.append(f"T,baseline,{benchmark},{question},{tokens},{(tokens + 1) * VERIFY_S},0,m")
    files = folder / "per_step.dev.csv.gz", folder / "per_question.dev.csv"
    files[0].write_bytes(gzip.compress("\n".join(rounds).encode()))
    files[1].write_text("\n".join(totals), encoding="utf-8")
    return files


def write_hsd(
    folder: Path,
    rounds: dict[tuple[str, int], Sequence[tuple[int, int]]],
    round_ms: float = 30.0,
    stalled: bool = False,
) -> Path:
    """Write an HSD log of (accepted, draft length with root) by run and question; `stalled`: round 1 takes 1 s."""
    lines = ["run,question,turn,step,accept_length,draft_length,tree_verify_ms,eval_ms,update_draft_ms"]
    for (run, question), logged in rounds.items():
        for step, (accepted, drafted) in enumerate(logged):
            verify_ms = 1000.0 if stalled and len(lines) == 1 else round_ms * 0.7
            lines.append(
                f"{run},{question},0,{step},{accepted},{drafted},{verify_ms},{round_ms * 0.1},{round_ms * 0.2}"
            )
    file = folder / "per_step.dev.csv.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return file
