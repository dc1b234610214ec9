"""One scenario, simulated for a comparison: what each request got, in the order in which they were sent."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.common.arrays import Floats
from calibration.common.errors import CalibrationError, ExtrapolationWarning
from calibration.traces import TraceSet
from simulator import RunResult, Scenario, simulate


@dataclass(frozen=True)
class Served:
    """What the simulation gave its requests: `seconds` from admission to the end, `decode_s` without the prefill.

    `tokens` are output tokens, the prefill's included. `extrapolated`: share of iterations priced outside of what
    was measured.
    """

    tokens: Floats
    seconds: Floats
    decode_s: Floats
    rounds: Floats
    extrapolated: float
    result: RunResult

    @property
    def tokens_per_round(self) -> float:
        """Accepted length, bonus included: tokens that rounds emitted over rounds."""
        return float((self.tokens - 1).sum() / self.rounds.sum())


def serve(scenario: Mapping[str, Any], traces: TraceSet) -> Served:
    """Simulate `scenario` on `traces`. Prices outside of the measured range are counted, not warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExtrapolationWarning)
        result = simulate(Scenario.model_validate(scenario), traces)
    table = result.requests.sort_by("request_id")
    column = {
        name: table[name].to_numpy().astype(np.float64)
        for name in ("output_tokens", "start_s", "first_token_s", "finish_s", "rounds")
    }
    return Served(
        tokens=column["output_tokens"],
        seconds=column["finish_s"] - column["start_s"],
        decode_s=column["finish_s"] - column["first_token_s"],
        rounds=column["rounds"],
        extrapolated=result.summary["extrapolated_iterations"] / max(1, result.summary["iterations"]),
        result=result,
    )


def serve_one_by_one(
    traces: TraceSet,
    drafter: str,
    draft_tokens: int,
    costs: Mapping[str, Any],
    lengths: Sequence[tuple[int, int]],
) -> Served:
    """Serve requests with these (prompt, output) tokens, one at a time; request i replays sequence i of `traces`.

    An output that is shorter than its recording is cut, a longer one goes on with recorded blocks of its domain.
    `draft_tokens` 0 decodes plainly.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.csv"
        rows = "".join(f"0,{prompt},{output}\n" for prompt, output in lengths)
        path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows, encoding="utf-8")
        scenario = {
            "drafter": {"name": drafter},
            "stopping": {"policy": "fixed", "draft_tokens": draft_tokens} if draft_tokens else {"policy": "none"},
            "engine": {"max_num_seqs": 1},
            "workload": {"kind": "trace", "format": "csv", "path": str(path)},
            "costs": dict(costs),
        }
        return serve(scenario, traces)


def table_path(data: Path, *parts: str) -> Path:
    """Give the path of a published table below `data`; `CalibrationError` where it is not there."""
    path = data.joinpath(*parts)
    if not path.exists():
        raise CalibrationError(f"{data}: must hold the published table {'/'.join(parts)}, which is missing")
    return path


def by_rank(wanted: Sequence[float], recorded: Sequence[float]) -> list[int]:
    """Give for every wanted length the recorded one of the same rank, as its index.

    How much is accepted goes with length (text that repeats itself, text that drifts), so requests replay recordings
    of like length: cutting long recordings short at random keeps their beginnings alone.
    """
    rank = np.argsort(np.argsort(np.asarray(wanted), kind="stable"), kind="stable")
    order = np.argsort(np.asarray(recorded), kind="stable")
    return [int(order[place * len(recorded) // len(wanted)]) for place in rank.tolist()]
