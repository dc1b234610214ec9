"""Recording: the verifier writes, then everyone reads the text once more, teacher-forced, side by side.

One pass over prompt + output gives every position of every drafter at once:

*Greedy.* A match bit says whether the drafter's largest logit at t is x_t. The run length n_t, how many drafted
tokens match from t on, is the run of ones that starts at t. Bits suffice because these drafters see tokens alone: as
long as a draft agrees with the text, its context is a prefix of the text, which is what the pass has shown it. (A
drafter with a state of its own, such as EAGLE, needs run lengths measured from every start.)

*Sampled.* a_t = min(1, q_t(x_t) / p_t(x_t)) under the processed distributions: the probability that a token drafted
at t was accepted, given that x_t is emitted there. It follows from the acceptance rule of Leviathan et al. (2023) and
Chen et al. (2023): P(accepted and emitted = v) = min(p(v), q(v)) and P(emitted = v) = p(v).

Both replays are exact, the second in distribution. Prompt lookup proposes given tokens: its run lengths are exact in
both modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from calibration.drafters import Drafter, PromptLookup
from calibration.fetch import Advance
from calibration.generate import Output
from calibration.ngram import NgramIndex, lookup_runs
from calibration.reading import Reading, Stats, read_together, run_lengths
from calibration.rollouts import rollout
from calibration.traces.manifest import DecodingInfo

Columns = dict[str, list[Any]]


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
    records none. `advance` is called with the positions just read.
    """
    lookups = {d.name: _lookups(d.spec, requests, outputs) for d in drafters if isinstance(d.spec, PromptLookup)}
    reading = read_together(
        verifier,
        {d.name: d.model for d in drafters if d.model is not None},
        [r.prompt_ids for r in requests],
        [o.ids for o in outputs],
        decoding,
        generator,
        given={name: _first_tokens(rows) for name, rows in lookups.items()},
        advance=advance,
    )
    recording = Recording()
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
            }
            if drafter.model is None:
                columns |= _lookup_columns(lookups[drafter.name][row], reading.mass[drafter.name][row])
            else:
                columns |= _model_columns(reading.drafters[drafter.name], row, count, decoding)
            _append(recording.positions, columns)
    if rollout_stride:
        lengths = [len(o.ids) for o in outputs]
        starts = list(range(0, max(lengths), rollout_stride))
        for name in reading.drafters:
            runs = _free_runs(reading, name, starts, gamma_max, decoding, generator)
            _append(recording.rollouts, _rollout_columns(name, requests, lengths, starts, runs))
    return recording


def _append(table: Columns, columns: Columns) -> None:
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
        "accept_probability": mine["match"].astype(float).tolist() if greedy else mine["accept"].tolist(),
        "emitted_rank": mine["rank"].tolist(),
        "drafter_confidence": mine["confidence"].tolist(),
        "drafter_entropy": mine["entropy"].tolist(),
        "overlap": mine["overlap"].tolist(),
    }


@dataclass(frozen=True)
class _Lookup:
    """Prompt lookup over one row: run length, proposal length and first proposed token (-1: none) per position."""

    runs: list[int]
    lengths: list[int]
    first: list[int]


def _lookups(spec: PromptLookup, requests: Sequence[Request], outputs: Sequence[Output]) -> list[_Lookup]:
    sizes = {"ngram_max": spec.ngram_max, "ngram_min": spec.ngram_min, "max_draft_tokens": spec.max_draft_tokens}
    rows = []
    for request, output in zip(requests, outputs, strict=True):
        runs, lengths = lookup_runs(request.prompt_ids, output.ids, **sizes)
        index = NgramIndex(request.prompt_ids, **sizes)
        first = []
        for token in output.ids:
            first.append(next(iter(index.propose(1)), -1))
            index.extend([token])
        rows.append(_Lookup(runs, lengths, first))
    return rows


def _first_tokens(rows: Sequence[_Lookup]) -> torch.Tensor:
    width = max(len(row.first) for row in rows)
    return torch.tensor([row.first + [-1] * (width - len(row.first)) for row in rows])


def _lookup_columns(lookup: _Lookup, mass: Any) -> Columns:
    """Columns of prompt lookup: acceptance and overlap p(proposed token) are missing where nothing is proposed."""
    proposes = [length > 0 for length in lookup.lengths]
    hits = [run > 0 for run in lookup.runs]
    count = len(proposes)
    return {
        "run_length": lookup.runs,
        "proposal_length": lookup.lengths,
        "accept_probability": [float(hit) if any_ else None for hit, any_ in zip(hits, proposes, strict=True)],
        "emitted_rank": [0 if hit else None for hit in hits],
        "drafter_confidence": [None] * count,
        "drafter_entropy": [None] * count,
        "overlap": [p if any_ else None for p, any_ in zip(mass[:count].tolist(), proposes, strict=True)],
    }


def _free_runs(
    reading: Reading,
    name: str,
    starts: list[int],
    steps: int,
    decoding: DecodingInfo,
    generator: torch.Generator,
) -> tuple[Any, Any]:
    """Give (confidence, entropy) [rows, starts, steps], the teacher-forced step 1 in front."""
    lane, stats = reading.lanes[name], reading.drafters[name]
    later = rollout(
        lane,
        torch.as_tensor(stats["drafted"][:, starts], device=lane.device),
        torch.tensor(starts, device=lane.device),
        origin=reading.origin,
        prompt_tokens=reading.prompt_tokens,
        steps=steps,
        decoding=decoding,
        generator=generator,
    )
    first = [torch.as_tensor(stats[key][:, starts, None]) for key in ("confidence", "entropy")]
    confidence, entropy = (torch.cat([a, b.cpu()], 2).numpy() for a, b in zip(first, later, strict=True))
    return confidence, entropy


def _rollout_columns(
    name: str, requests: Sequence[Request], lengths: list[int], starts: list[int], runs: tuple[Any, Any]
) -> Columns:
    columns: Columns = {}
    steps = runs[0].shape[2]
    for row, request in enumerate(requests):
        mine = [t for t in starts if t < lengths[row]]
        count = len(mine) * steps
        _append(
            columns,
            {
                "sequence_id": [request.sequence_id] * count,
                "drafter": [name] * count,
                "position": [t for t in mine for _ in range(steps)],
                "step": list(range(1, steps + 1)) * len(mine),
                "drafter_confidence": runs[0][row, : len(mine)].ravel().tolist(),
                "drafter_entropy": runs[1][row, : len(mine)].ravel().tolist(),
            },
        )
    return columns
