"""Lane drafters with a stopping rule of their own (Kangaroo's double early exit): live against recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from replayed import GREEDY, SAMPLED, live, recorded, rows_of, walk, written
from tiny import random_prompts

from calibration.common.errors import CalibrationError
from calibration.drafters import build_drafter, parse_drafter
from calibration.drafters.lanes import Stop

STOP = Stop(confidence=0.35, tokens=5)


@pytest.fixture(scope="module")
def drafter(tiny):
    return replace(build_drafter(parse_drafter("exit-3"), tiny), stop=STOP)


@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
def test_greedy_rounds_are_those_of_the_replay(tiny, drafter, gamma):
    prompts = random_prompts(7, 5)
    outputs = written(tiny, GREEDY, prompts, 30)
    trace = recorded(tiny, [drafter], prompts, outputs, GREEDY)
    runs = live(tiny, drafter, prompts, gamma, GREEDY, 30)
    lengths = {r.drafted for run in runs for r in run.rounds}
    assert len(lengths) > 1  # the rule does stop, and not always at once
    assert max(lengths) <= min(gamma, STOP.tokens)
    for row, (run, output) in enumerate(zip(runs, outputs, strict=True)):
        assert run.ids == output.ids
        assert run.rounds == walk(rows_of(trace.positions, f"r{row}", drafter.name), gamma)


def test_sampled_runs_are_those_of_live_rounds_in_distribution(tiny, drafter):
    """Given the live text, what was accepted from a start and what is recorded there are draws of one law."""
    prompts = random_prompts(3, 48)
    difference, square, count = 0.0, 0.0, 0
    for seed in range(3):
        runs = live(tiny, drafter, prompts, STOP.tokens, SAMPLED, 60, frozenset(), seed)
        outputs = [type("Output", (), {"ids": run.ids, "finish_reason": run.finish_reason}) for run in runs]
        trace = recorded(tiny, [drafter], prompts, outputs, SAMPLED, seed=seed + 100)
        for row, run in enumerate(runs):
            rows = rows_of(trace.positions, f"r{row}", drafter.name)
            for r in run.rounds:
                if r.start + STOP.tokens < len(run.ids):  # not cut by the end
                    gap = r.accepted - rows["run_length"][r.start]
                    difference, square, count = difference + gap, square + gap**2, count + 1
            assert all(
                n <= m <= STOP.tokens for n, m in zip(rows["run_length"], rows["proposal_length"], strict=True)
            )
    assert count > 2000
    assert square > 300
    assert abs(difference) < 3.5 * np.sqrt(square)


def test_two_drafters_of_one_name_are_refused(tiny):
    prompts = random_prompts(7, 2)
    outputs = written(tiny, GREEDY, prompts, 8)
    first = build_drafter(parse_drafter("exit-3"), tiny)
    second = replace(build_drafter(parse_drafter("exit-2"), tiny), info=first.info.model_copy(update={"layers": 2}))
    with pytest.raises(CalibrationError, match="drafter 'exit-3': two different drafters have this name"):
        recorded(tiny, [first, second], prompts, outputs, GREEDY)
