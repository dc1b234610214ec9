"""Live rounds against those that a recording promises; nothing of the live loop is used to replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from live import LiveRun, Round, speculate
from tiny import random_prompts

from calibration.models.lane import Output, generate
from calibration.models.sampling import generator_for
from calibration.recording.record import Recording, Request, record
from calibration.traces import DecodingInfo

CPU = torch.device("cpu")
GREEDY = DecodingInfo(mode="greedy")
SAMPLED = DecodingInfo(mode="sampled", temperature=0.8, top_p=0.9)
ENDS = frozenset({2, 40, 41})


def rows_of(columns: dict[str, list[Any]], sequence: str, drafter: str) -> dict[str, list[Any]]:
    """The rows of one sequence and one drafter."""
    keys = zip(columns["sequence_id"], columns["drafter"], strict=True)
    pick = [i for i, key in enumerate(keys) if key == (sequence, drafter)]
    return {name: [values[i] for i in pick] for name, values in columns.items()}


def walk(rows: dict[str, list[Any]], gamma: int) -> tuple[Round, ...]:
    """The rounds that recorded run and proposal lengths give with drafts of `gamma` tokens."""
    total = len(rows["run_length"])
    rounds, t = [], 1
    while t < total:
        most = rows["proposal_length"][t]
        drafted = gamma if most is None else min(gamma, most)
        accepted = min(rows["run_length"][t], drafted)
        emitted = min(accepted + 1, total - t)
        rounds.append(Round(t, drafted, accepted, emitted))
        t += emitted
    return tuple(rounds)


def written(verifier: Any, decoding: DecodingInfo, prompts: Sequence[Sequence[int]], tokens: int) -> list[Output]:
    """What the verifier writes to the prompts."""
    return generate(verifier.model, prompts, decoding, tokens, ENDS, generator_for(CPU, 0))


def recorded(
    verifier: Any,
    drafters: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Any],
    decoding: DecodingInfo,
    gamma_max: int = 8,
    stride: int = 0,
    seed: int = 0,
) -> Recording:
    """The recording of these texts."""
    requests = [Request(f"r{i}", "chat", tuple(p)) for i, p in enumerate(prompts)]
    return record(
        verifier.model,
        drafters,
        requests,
        outputs,
        decoding,
        generator_for(CPU, seed),
        gamma_max=gamma_max,
        rollout_stride=stride,
    )


def live(
    verifier: Any,
    drafter: Any,
    prompts: Sequence[Sequence[int]],
    gamma: int,
    decoding: DecodingInfo,
    tokens: int,
    ends: frozenset[int] = ENDS,
    seed: int = 0,
) -> list[LiveRun]:
    """The live loop."""
    return speculate(
        verifier.model,
        drafter,
        prompts,
        gamma=gamma,
        decoding=decoding,
        max_new_tokens=tokens,
        end_ids=ends,
        generator=generator_for(CPU, seed),
    )


def same_rounds(
    verifier: Any, drafter: Any, *, tokens: int = 30, rows: int = 6, gammas: Sequence[int] = (1, 2, 4, 8)
) -> int:
    """Assert that greedy live rounds are those of the replay; give how many drafted tokens were accepted in all."""
    prompts = random_prompts(11, rows)
    outputs = written(verifier, GREEDY, prompts, tokens)
    trace = recorded(verifier, [drafter], prompts, outputs, GREEDY)
    accepted = 0
    for gamma in gammas:
        runs = live(verifier, drafter, prompts, gamma, GREEDY, tokens)
        for row, (run, output) in enumerate(zip(runs, outputs, strict=True)):
            assert (run.ids, run.finish_reason) == (output.ids, output.finish_reason)
            assert run.rounds == walk(rows_of(trace.positions, f"r{row}", drafter.name), gamma)
            assert 1 + sum(r.emitted for r in run.rounds) == len(run.ids)
            accepted += sum(r.accepted for r in run.rounds)
    return accepted
