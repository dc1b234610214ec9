"""Measured runs of an engine made up for tests: a small loop of its own, whose steps take what a given law says.

The loop is written without the simulator's engine, scheduler or prices; the requests and their arrivals come from the
scenario, as those of a real driver do. Numbers are drawn, not measured, and the manifests say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from builders import manifest as trace_manifest
from builders import run_lengths

from calibration.common.toml import dumps
from calibration.measured import EngineInfo, Manifest, MeasuredRun
from calibration.traces import DeviceInfo, ModelInfo, TraceSet, make_table
from simulator.playback.replay import select_sequences
from simulator.scenario.loading import parse_scenario
from simulator.scenario.scenario import Scenario
from simulator.workload import Request, make_source

LOOKUP, STUDENT = "lookup", "student"
Sequences = list[tuple[int, int]]
"""New tokens and cached tokens of every sequence of a step."""


def engine_law(decoding: Sequences, prompts: Sequences) -> float:
    """Seconds of one forward pass: a smooth roofline, attention, an LM head and host time for each sequence.

    Of another form than any fit: layers are a square root of squares, attention over cached tokens grows with the
    new ones, and host time counts sequences.
    """
    tokens = sum(new for new, _ in decoding + prompts)
    layers = math.hypot(0.022, 0.0011 * tokens)
    head = math.hypot(0.006, 0.0003 * (sum(new for new, _ in decoding) + len(prompts)))
    attention = sum(8e-6 * cached * (1 + 0.05 * (new - 1)) for new, cached in decoding)
    attention += sum(5e-7 * new * (new / 2 + cached) for new, cached in prompts)
    return 0.001 + layers + head + attention + 0.00015 * len(decoding + prompts)


def student_law(tokens: int, cached: int) -> float:
    """Seconds of one step of the drafter `STUDENT`."""
    return math.hypot(0.003, 0.0002 * tokens) + 5e-7 * cached


def made_traces(seed: int = 0, sequences: int = 24, outputs: tuple[int, int] = (24, 48)) -> TraceSet:
    """Greedy text of two domains with a prompt lookup (its own proposal lengths) and a model drafter."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("sequence_id", "drafter", "position", "run_length", "proposal_length")
    }
    names, lengths = [f"s{i}" for i in range(sequences)], rng.integers(*outputs, sequences).tolist()
    for name, length in zip(names, lengths, strict=True):
        for drafter, alpha in ((LOOKUP, 0.5), (STUDENT, 0.7)):
            runs = run_lengths(rng.random(length) < alpha)
            proposals = rng.integers(0, 2, length) * 8
            if drafter == LOOKUP:
                runs = np.minimum(runs, proposals)
            rows["sequence_id"] += [name] * length
            rows["drafter"] += [drafter] * length
            rows["position"] += range(length)
            rows["run_length"] += runs.tolist()
            rows["proposal_length"] += proposals.tolist() if drafter == LOOKUP else [None] * length
    told = trace_manifest(drafters=(LOOKUP, STUDENT))
    # The LM head of `engine_law` costs 3/11 of a token in the layers.
    verifier = ModelInfo(name="verifier", vocabulary=3000, hidden_size=10, parameters_non_embedding=110_000)
    lookup = told.drafters[0].model_copy(update={"paradigm": "prompt-lookup", "deterministic": True, "layers": 0})
    columns = {
        "sequence_id": names,
        "domain": ["chat" if i % 2 else "code" for i in range(sequences)],
        "prompt_tokens": rng.integers(16, 160, sequences).tolist(),
        "output_tokens": lengths,
        "finish_reason": ["length"] * sequences,
        "output_token_ids": [rng.integers(0, 999, length).tolist() for length in lengths],
    }
    tables = {"sequences": make_table("sequences", columns), "positions": make_table("positions", rows)}
    whole = told.model_copy(update={"verifier": verifier, "drafters": (lookup, told.drafters[1])})
    return TraceSet.build(whole, tables)


def condition(
    batch: int, draft_tokens: int = 0, drafter: str = LOOKUP, *, rate_rps: float | None = None, **tables: Any
) -> dict[str, Any]:
    """The scenario of a condition: `batch` slots, so many clients unless arrivals come at a rate."""
    workload: dict[str, Any] = {"kind": "closed", "concurrency": batch, "stagger_s": 0.0}
    if rate_rps is not None:
        workload = {"kind": "poisson", "rate_rps": rate_rps}
    stopping: dict[str, Any] = {"policy": "none"}
    if draft_tokens:
        stopping = {"policy": "fixed", "draft_tokens": draft_tokens}
    return {
        "traces": {"path": "../traces"},
        "drafter": {"name": drafter},
        "stopping": stopping,
        "engine": {"max_num_seqs": batch},
        "workload": workload,
        **tables,
    }


@dataclass
class _Live:
    """A request being served: what it has, and what became of it."""

    request: Request
    emitted: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def receive(self, tokens: int, now: float) -> None:
        self.emitted += tokens
        self.times.append(now)
        self.counts.append(tokens)

    @property
    def context(self) -> int:
        return self.request.prompt_tokens + self.emitted - 1


class MadeEngine:
    """Serves one repeat of a scenario and keeps the rows of both tables.

    `noise`: standard deviation of the logarithm of step times; `outliers`: share of steps that take ten times as
    long; `slow`: times as long that a step takes, by its number. `tells_drafts`: whether draft steps are rows of
    their own or only part of the verifier's.
    """

    def __init__(
        self,
        scenario: Scenario,
        traces: TraceSet,
        repeat: int,
        rng: np.random.Generator,
        *,
        law: Callable[[Sequences, Sequences], float] = engine_law,
        noise: float = 0.0,
        outliers: float = 0.0,
        slow: Callable[[int], float] = lambda step: 1,
        tells_drafts: bool = True,
    ) -> None:
        assert scenario.drafter is not None
        self.scenario, self.repeat, self.rng, self.law = scenario, repeat, rng, law
        self.noise, self.outliers, self.slow, self.tells_drafts = noise, outliers, slow, tells_drafts
        self.drafter = scenario.drafter.name
        self.longest = getattr(scenario.stopping, "draft_tokens", 0)
        self.table = select_sequences(traces, domains=scenario.traces.domains, drafter=self.drafter)
        mine = traces.positions.to_pandas().query("drafter == @self.drafter")
        self.runs = {n: rows["run_length"].tolist() for n, rows in mine.groupby("sequence_id")}
        self.proposals = {n: rows["proposal_length"].tolist() for n, rows in mine.groupby("sequence_id")}
        ids, texts = (traces.sequences[name].to_pylist() for name in ("sequence_id", "output_token_ids"))
        self.texts = dict(zip(ids, texts, strict=True))
        self.source = make_source(scenario, self.table)
        self.now, self.number = 0.0, 0
        self.live: list[_Live] = []
        self.requests: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []

    def run(self) -> None:
        """Serve every counted request."""
        chunked = bool(self.scenario.engine.enable_chunked_prefill)
        while not self.source.done:
            fresh = [
                _Live(r) for r in self.source.admit(self.now, self.scenario.engine.max_num_seqs - len(self.live))
            ]
            if not fresh and not self.live:
                self.now = self.source.next_arrival_s
                continue
            self._iterate(self.live if chunked or not fresh else [], fresh)
            self.live = [one for one in self.live + fresh if not self._ended(one)]

    def _iterate(self, decoding: list[_Live], fresh: list[_Live]) -> None:
        drafted = [self._proposed(one) for one in decoding]
        start = self.now
        draft_s = self._draft(drafted, decoding, fresh)
        sequences = [(1 + k, one.context) for k, one in zip(drafted, decoding, strict=True)]
        prompts = [(one.request.prompt_tokens, 0) for one in fresh]
        seconds = self._scatter(self.law(sequences, prompts)) + (0 if self.tells_drafts else draft_s)
        self.now += seconds
        emitted = [self._verify(one, k) for one, k in zip(decoding, drafted, strict=True)]
        for one in fresh:
            one.receive(1, self.now)
        self._row(
            operation="mixed" if sequences and prompts else "decode" if sequences else "prefill",
            model="verifier",
            start_s=self.now - seconds if self.tells_drafts else start,
            seconds=seconds,
            sequences=len(sequences),
            new_tokens=sum(new for new, _ in sequences),
            context_tokens=sum(cached for _, cached in sequences),
            prefill_sequences=len(prompts),
            prefill_tokens=sum(new for new, _ in prompts),
            drafted_tokens=sum(drafted),
            accepted_tokens=sum(emitted) - len(emitted),
            emitted_tokens=sum(emitted) + len(fresh),
        )
        self.number += 1

    def _proposed(self, one: _Live) -> int:
        most = self.proposals[self._name(one)][one.emitted]
        return self.longest if most is None or math.isnan(most) else min(self.longest, int(most))

    def _draft(self, drafted: list[int], decoding: list[_Live], fresh: list[_Live]) -> float:
        """Let the model drafter read prompts and draft; a lookup takes no time of its own."""
        if self.drafter != STUDENT or not self.longest:
            return 0.0
        steps = [(len(fresh), sum(one.request.prompt_tokens for one in fresh), 0)] if fresh else []
        context = sum(one.context for one in decoding)
        longest = max(drafted, default=0)
        steps += [(len(decoding), len(decoding), context + j * len(decoding)) for j in range(longest)]
        total = 0.0
        for sequences, tokens, cached in steps:
            seconds = self._scatter(student_law(tokens, cached))
            total += seconds
            if self.tells_drafts:
                self._row(
                    operation="draft",
                    model=self.drafter,
                    start_s=self.now,
                    seconds=seconds,
                    sequences=sequences,
                    new_tokens=tokens,
                    context_tokens=cached,
                )
                self.now += seconds
        return total

    def _verify(self, one: _Live, drafted: int) -> int:
        left = one.request.output_tokens - one.emitted
        accepted = min(int(self.runs[self._name(one)][one.emitted]), drafted)
        one.drafts += drafted > 0
        one.drafted += drafted
        emitted = min(accepted + 1, left)
        one.accepted += min(accepted, left)
        one.receive(emitted, self.now)
        return emitted

    def _name(self, one: _Live) -> str:
        return self.table.ids[one.request.sequence]

    def _scatter(self, seconds: float) -> float:
        seconds *= float(np.exp(self.noise * self.rng.normal() - self.noise**2 / 2))
        return seconds * (10 if self.rng.random() < self.outliers else 1) * self.slow(self.number)

    def _row(self, **values: Any) -> None:
        whole = dict.fromkeys(
            (
                "prefill_sequences",
                "prefill_tokens",
                "prefill_context_tokens",
                "drafted_tokens",
                "accepted_tokens",
                "emitted_tokens",
            ),
            0,
        )
        self.steps.append(
            {"repeat": self.repeat, "step": self.number, "wall_s": values["seconds"], **whole, **values}
        )

    def _ended(self, one: _Live) -> bool:
        if one.emitted < one.request.output_tokens:
            return False
        request = one.request
        self.source.end(request, self.now)
        speculates = self.longest > 0
        self.requests.append(
            {
                "repeat": self.repeat,
                "request_id": request.id,
                "sequence_id": self._name(one),
                "domain": self.table.domains[request.sequence],
                "counted": request.counted,
                "arrival_s": request.arrival_s,
                "first_token_s": one.times[0],
                "finish_s": self.now,
                "prompt_tokens": request.prompt_tokens,
                "output_tokens": request.output_tokens,
                "drafts": one.drafts if speculates else None,
                "drafted_tokens": one.drafted if speculates else None,
                "accepted_tokens": one.accepted if speculates else None,
                "emission_s": one.times,
                "emitted": one.counts,
                "output_token_ids": self.texts[self._name(one)][: request.output_tokens],
            }
        )
        return True


def measure(
    folder: Path,
    traces: TraceSet,
    data: Mapping[str, Any],
    *,
    role: str = "held-out",
    repeats: int = 1,
    **engine: Any,
) -> MeasuredRun:
    """Run the scenario `data` on a made engine and write the measured run to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    scenario = parse_scenario(data, folder=folder)
    rng = np.random.default_rng(engine.pop("seed", sum(map(ord, folder.name))))
    tells = engine.pop("tells_steps", True)
    rows: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for repeat in range(repeats):
        made = MadeEngine(scenario, traces, repeat, rng, **engine)
        made.run()
        rows, steps = rows + made.requests, steps + made.steps
    told = Manifest(
        paceline_version="0",
        name=folder.name,
        role=role,  # type: ignore[arg-type]
        engine=EngineInfo(name="made for a test"),
        model="verifier",
        device=DeviceInfo(name="none", kind="unknown"),
        clock="thread-cpu",
        repeats=repeats,
        created="2026-01-01T00:00:00+00:00",
        command="tests",
        scenario_hash=scenario.hash,
        notes=("drawn for a test",),
    )
    columns = [{name: [row[name] for row in table] for name in table[0]} for table in (rows, steps)]
    run = MeasuredRun.build(told, columns[0], columns[1] if tells else None, dumps(data))
    run.write(folder)
    return run
