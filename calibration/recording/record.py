"""Recording: the verifier writes, then everyone reads the text once more, teacher-forced, side by side.

*Lane drafters*, one pass over prompt + output for all positions:

Greedy: a match bit says whether the drafter's largest logit at t is x_t. The run length n_t, how many drafted tokens
match from t on, is the run of ones that starts at t. Bits suffice because these drafters see tokens alone: as long as
a draft agrees with the text, its context is a prefix of the text, which is what the pass has shown it.

Sampled: a_t = min(1, q_t(x_t) / p_t(x_t)) under the processed distributions: the probability that a token drafted
at t was accepted, given that x_t is emitted there. It follows from the acceptance rule of Leviathan et al. (2023) and
Chen et al. (2023): P(accepted and emitted = v) = min(p(v), q(v)) and P(emitted = v) = p(v).

*Start drafters* propose from every start, and their run lengths are measured one by one; see
`calibration.recording.reading`. All replays are exact, the sampled ones in distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from calibration.common.arrays import Ints
from calibration.common.errors import CalibrationError
from calibration.common.fetch import Advance
from calibration.drafters.lanes import ModelDrafter
from calibration.models.drafter import Drafter, Drafts, Read, StartDrafter, Tap
from calibration.models.lane import Output, rollout
from calibration.models.sampling import numpy_generator
from calibration.recording.reading import (
    Columns,
    Reading,
    Stats,
    leading_true,
    position_columns,
    read_together,
    rollout_columns,
    run_lengths,
)
from calibration.traces.manifest import DecodingInfo


@dataclass(frozen=True)
class Request:
    """One prompt to record: its name, domain and token ids."""

    sequence_id: str
    domain: str
    prompt_ids: tuple[int, ...]


@dataclass
class Recording:
    """Columns of the tables recorded for one batch, and how often the second reading disagreed with the first.

    ``disagreements``: in greedy decoding, positions where the teacher-forced verifier's largest logit is not the
    token that it generated; in sampled decoding, positions whose token has probability 0 in the second reading. Both
    come from floating-point noise between differently shaped passes.
    """

    sequences: Columns = field(default_factory=dict)
    positions: Columns = field(default_factory=dict)
    rollouts: Columns = field(default_factory=dict)
    tokens: int = 0
    disagreements: int = 0

    @property
    def tables(self) -> dict[str, Columns]:
        """The columns by table name."""
        return {"sequences": self.sequences, "positions": self.positions, "rollouts": self.rollouts}


@dataclass(frozen=True)
class _Session:
    """What is the same for all drafters of a batch."""

    verifier: Any
    requests: Sequence[Request]
    outputs: Sequence[Output]
    decoding: DecodingInfo
    generator: torch.Generator
    gamma_max: int
    rollout_stride: int

    @property
    def lengths(self) -> list[int]:
        return [len(output.ids) for output in self.outputs]


def record(
    verifier: Any,
    drafters: Sequence[Drafter],
    requests: Sequence[Request],
    outputs: Sequence[Output],
    decoding: DecodingInfo,
    generator: torch.Generator,
    *,
    gamma_max: int,
    rollout_stride: int,
    advance: Advance | None = None,
) -> Recording:
    """Read `outputs` once with the `verifier` model and every drafter; give the rows of all three tables.

    Rollouts of `gamma_max` steps start at every `rollout_stride`-th position (t = 0, stride, ...); a stride of 0
    records none. Start drafters draft up to `gamma_max` tokens from every position, where the drafter itself
    states no other limit. `advance` is called with the positions just read.
    """
    session = _Session(
        verifier=verifier,
        requests=requests,
        outputs=outputs,
        decoding=decoding,
        generator=generator,
        gamma_max=gamma_max,
        rollout_stride=rollout_stride,
    )
    lanes = _lane_drafters(drafters)
    reading = read_together(
        verifier,
        {d.name: d.model for d in lanes.values()},
        [r.prompt_ids for r in requests],
        [o.ids for o in outputs],
        decoding,
        generator,
        taps=_taps(drafters),
        windows={d.name: d.window for d in lanes.values()},
        advance=advance,
    )
    recording = Recording()
    by_drafter = _tables(session, reading, drafters, lanes)
    for row, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        count = len(output.ids)
        recording.tokens += count
        sure = reading.verifier["match" if decoding.mode == "greedy" else "probability"][row, :count] > 0
        recording.disagreements += int(count - sure.sum())
        _append(recording.sequences, _sequence(request, output))
        for drafter in drafters:
            keys = {"sequence_id": [request.sequence_id] * count, "drafter": [drafter.name] * count}
            columns: Columns = {
                **keys,
                "position": list(range(count)),
                **_verifier_columns(reading.verifier, row, count),
                **by_drafter[drafter.name][row][0],
            }
            _append(recording.positions, columns)
    for drafter in drafters:
        for row, request in enumerate(requests):
            columns = by_drafter[drafter.name][row][1]
            count = len(columns.get("step", ()))
            if count:
                keys = {"sequence_id": [request.sequence_id] * count, "drafter": [drafter.name] * count}
                _append(recording.rollouts, {**keys, **columns})
    return recording


def _lane_drafters(drafters: Sequence[Drafter]) -> dict[str, ModelDrafter]:
    """Collect every lane drafter, parts of others included, by name."""
    found: dict[str, ModelDrafter] = {}
    for drafter in drafters:
        mine: Mapping[str, Drafter] = {drafter.name: drafter}
        if not isinstance(drafter, ModelDrafter):
            mine = _lane_drafters(cast(StartDrafter, drafter).parts)
        for name, lane in mine.items():
            if name in found and found[name].info != lane.info:
                raise CalibrationError(f"drafter '{name}': two different drafters have this name; give one a name")
            found[name] = cast(ModelDrafter, lane)
    return found


def _taps(drafters: Sequence[Drafter]) -> tuple[Tap, ...]:
    found: dict[Tap, None] = {}
    if any(not isinstance(d, ModelDrafter) for d in drafters):
        found["norm"] = None  # for p of given tokens
    for drafter in drafters:
        found |= dict.fromkeys(drafter.taps)
        if not isinstance(drafter, ModelDrafter):
            found |= dict.fromkeys(_taps(cast(StartDrafter, drafter).parts))
    return tuple(found)


def _tables(
    session: _Session, reading: Reading, drafters: Sequence[Drafter], lanes: Mapping[str, ModelDrafter]
) -> dict[str, list[tuple[Columns, Columns]]]:
    """Give, by drafter and row, the columns of positions and of rollouts that it fills."""
    parts = _lane_drafters([d for d in drafters if not isinstance(d, ModelDrafter)])
    starts = {name: _starts(session, drafter, name in parts) for name, drafter in lanes.items()}
    runs = {name: _free_runs(session, reading, lanes[name], mine) for name, mine in starts.items() if len(mine)}
    found: dict[str, list[tuple[Columns, Columns]]] = {drafter.name: [] for drafter in drafters}
    for row in range(len(session.requests)):
        read = _read(session, reading, row, {name: runs[name][row] for name in parts})
        for drafter in drafters:
            if isinstance(drafter, ModelDrafter):
                free = runs[drafter.name][row] if drafter.name in runs else None
                tables = _model_tables(session, reading, drafter, row, free, starts[drafter.name])
            else:
                tables = _start_tables(session, cast(StartDrafter, drafter), read)
            found[drafter.name].append(tables)
    return found


def _starts(session: _Session, drafter: ModelDrafter, part: bool) -> Ints:
    """Say from where a lane drafter runs freely: everywhere where its drafts are needed, else at every stride."""
    stride = 1 if part or drafter.stop is not None else session.rollout_stride
    return np.arange(0, max(session.lengths) if stride else 0, stride or 1)


def _read(session: _Session, reading: Reading, row: int, free: Mapping[str, Drafts]) -> Read:
    request, output = session.requests[row], session.outputs[row]
    return Read(
        verifier=session.verifier,
        prompt_ids=request.prompt_ids,
        output_ids=output.ids,
        decoding=session.decoding,
        states={tap: rows[row] for tap, rows in reading.states.items()},
        chains=free,
    )


def _start_tables(session: _Session, drafter: StartDrafter, read: Read) -> tuple[Columns, Columns]:
    """Ask `drafter` from every start of one row."""
    info, greedy = drafter.info, session.decoding.mode == "greedy"
    with torch.inference_mode():
        drafts = drafter.drafts(read, info.max_draft_tokens or session.gamma_max, session.generator)
    mass = _first_mass(read, drafts) if info.deterministic and drafts.tokens.shape[1] else None
    columns = position_columns(
        drafts, read.output_ids, session.generator, deterministic=info.deterministic or greedy, mass=mass
    )
    starts = np.arange(0, len(read.output_ids) if session.rollout_stride else 0, session.rollout_stride or 1)
    return columns, rollout_columns(drafts.at(starts), starts)


def _first_mass(read: Read, drafts: Drafts) -> Any:
    """Give p of the first token proposed at each start, of a tree that of all its first tokens [T]."""
    if drafts.parents is None:
        return read.mass(drafts.tokens[:, 0])
    first = np.where(drafts.parents < 0, drafts.tokens, -1)
    return np.stack([read.mass(column) for column in first.T[(first >= 0).any(0)]]).sum(0)


def _model_tables(
    session: _Session,
    reading: Reading,
    drafter: ModelDrafter,
    row: int,
    free: Drafts | None,
    starts: Ints,
) -> tuple[Columns, Columns]:
    """Give the columns of a lane drafter for one row; its own stopping rule, if it has one, bounds its drafts."""
    output = session.outputs[row].ids
    columns = _model_columns(reading.drafters[drafter.name], row, len(output), session.decoding)
    if free is None:
        return columns, {}
    if drafter.stop is not None and session.decoding.mode == "greedy":
        stopped = position_columns(free, output, session.generator, deterministic=True)
        columns |= {key: stopped[key] for key in ("run_length", "proposal_length", "accept_probability")}
    elif drafter.stop is not None:
        sure = reading.drafters[drafter.name]["confidence"][row, : len(output)] >= drafter.stop.confidence
        columns |= _stopped_columns(free, run_lengths(sure).astype(np.int64), drafter.stop.tokens, session.generator)
    stride = session.rollout_stride
    keep = np.flatnonzero(starts[: len(free.tokens)] % stride == 0) if stride else starts[:0]
    return columns, rollout_columns(free.at(keep), starts[keep])


def _stopped_columns(free: Drafts, sure: Ints, most: int, generator: torch.Generator) -> Columns:
    """Give run and proposal lengths of a sampled drafter that stops by itself; `sure` [T]: tokens until it would.

    As long as its drafts are the text, it stops where it would stop on the text: the run lengths, one draw each, are
    exact in distribution. How long a draft goes on behind its first rejected token is taken from an independent free
    run: an approximation, which concerns the cost alone.
    """
    if free.accept is None:
        raise ValueError("a sampled drafter must say with which probability its drafts are accepted")
    limit = np.minimum(sure, most)
    drawn = leading_true(numpy_generator(generator).random(free.accept.shape) < np.nan_to_num(free.accept))
    runs = np.minimum(drawn, limit)
    proposed = np.where(drawn >= limit, limit, np.maximum((free.tokens >= 0).sum(1), runs + 1))
    first = [value if any_ else None for value, any_ in zip(free.accept[:, 0].tolist(), proposed > 0, strict=True)]
    return {"run_length": runs.tolist(), "proposal_length": proposed.tolist(), "accept_probability": first}


def _free_runs(session: _Session, reading: Reading, drafter: ModelDrafter, starts: Ints) -> list[Drafts]:
    """Give, for every row, what a lane drafter drafts from `starts`, the teacher-forced step 1 in front."""
    lane, stats = reading.lanes[drafter.name], reading.drafters[drafter.name]
    steps = session.gamma_max if drafter.stop is None else drafter.stop.tokens
    later = rollout(
        lane,
        torch.as_tensor(stats["drafted"][:, starts], device=lane.device),
        torch.as_tensor(starts, device=lane.device),
        origin=reading.origin,
        prompt_tokens=reading.prompt_tokens,
        steps=steps,
        decoding=session.decoding,
        generator=session.generator,
    )
    first = [torch.as_tensor(stats[key][:, starts, None]) for key in ("drafted", "confidence", "entropy")]
    tokens, confidence, entropy = (torch.cat([a, b.cpu()], 2).numpy() for a, b in zip(first, later, strict=True))
    if drafter.stop is not None:
        tokens = np.where(np.logical_or.accumulate(confidence < drafter.stop.confidence, 2), -1, tokens)
    found = []
    for row, count in enumerate(session.lengths):
        mine = starts[starts < count]
        keep = slice(0, len(mine))
        drafts = Drafts(
            tokens[row, keep].astype(np.int32), confidence=confidence[row, keep], entropy=entropy[row, keep]
        )
        if session.decoding.mode == "sampled":
            drafts = replace(drafts, accept=_along(stats["accept"][row, :count], steps)[mine])
        found.append(drafts)
    return found


def _along(values: Any, depth: int) -> Any:
    """Give `values` [T] from every start on [T, depth]: entry (t, j) is that of t + j, NaN behind the end."""
    padded = np.concatenate([values, np.full(depth, np.nan, dtype=np.float32)])
    return np.lib.stride_tricks.sliding_window_view(padded, depth)[: len(values)].astype(np.float32)


def _append(table: Columns, columns: Mapping[str, list[Any]]) -> None:
    for name, values in columns.items():
        table.setdefault(name, []).extend(values)


def _sequence(request: Request, output: Output) -> Columns:
    return {
        "sequence_id": [request.sequence_id],
        "domain": [request.domain],
        "prompt_tokens": [len(request.prompt_ids)],
        "output_tokens": [len(output.ids)],
        "finish_reason": [output.finish_reason],
        "prompt_token_ids": [list(request.prompt_ids)],
        "output_token_ids": [list(output.ids)],
    }


def _verifier_columns(stats: Stats, row: int, count: int) -> Columns:
    return {
        "verifier_confidence": stats["confidence"][row, :count].tolist(),
        "verifier_entropy": stats["entropy"][row, :count].tolist(),
    }


def _model_columns(stats: Stats, row: int, count: int, decoding: DecodingInfo) -> Columns:
    mine = {key: values[row, :count] for key, values in stats.items()}
    greedy = decoding.mode == "greedy"
    return {
        "run_length": run_lengths(mine["match"]).tolist() if greedy else [None] * count,
        "proposal_length": [None] * count,
        "proposal_nodes": [None] * count,
        "draft_layers": [None] * count,
        "accept_probability": mine["match"].astype(float).tolist() if greedy else mine["accept"].tolist(),
        "emitted_rank": mine["rank"].tolist(),
        "drafter_confidence": mine["confidence"].tolist(),
        "drafter_entropy": mine["entropy"].tolist(),
        "overlap": mine["overlap"].tolist(),
    }
