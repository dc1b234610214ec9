"""TraceSets from requests whose rounds an engine counted: in order, or as a histogram.

Of a histogram the order of the rounds is not known: it is drawn. Shared by the importers of vLLM, SGLang and AIPerf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator

from calibration.common.errors import TraceError
from calibration.importers.origin import Origin, prompt_source
from calibration.importers.reading import Collected
from calibration.importers.rounds import Rounds, Tally, depth_rates, drafts_for, fill, rounds_of
from calibration.observe.answer import SpecMetrics
from calibration.traces import TraceSet


@dataclass(frozen=True)
class Request:
    """One answered request: where its report stands, its lengths in tokens, why it ended, and its rounds.

    `output_tokens` None: not reported; it is then what the rounds emitted.
    """

    place: str
    name: str
    domain: str
    prompt_tokens: int
    output_tokens: int | None
    finish_reason: str
    metrics: SpecMetrics


@dataclass(frozen=True)
class Source:
    """One file, its domain, how many requests it gave and how many of its objects were left out, without rounds."""

    path: Path
    domain: str
    requests: int
    left_out: int = 0


def requests_to_traces(
    requests: Sequence[Request],
    sources: Sequence[Source],
    import_format: str,
    *,
    origin: Origin,
    seed: int,
    unknown: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> TraceSet:
    """Give the TraceSet of `requests` from the files `sources`.

    The manifest says in numbers what was measured, what follows and what was drawn. Raises `TraceError` for requests
    that contradict themselves, where no token was drafted at all, and where many rounds had no draft and `origin`
    does not tell the paradigm, which says whose choice that was.
    """
    rng = np.random.default_rng(seed)
    told = [_rounds(request, rng) for request in requests]
    longest = max((int(one.drafted.max(initial=0)) for one in told), default=0)
    if longest == 0:
        raise TraceError(f"{sources[0].path}: no request drafted a token; was speculation on?")
    rates = depth_rates(told)
    collected, tally = Collected(), Tally()
    for request, rounds in zip(requests, told, strict=True):
        output_tokens = request.output_tokens or 1 + int((rounds.accepted + 1).sum())
        filled = fill(rounds, output_tokens, longest, rates, looks_up=origin.looks_up, rng=rng)
        tally.add(filled.tally)
        tally.requests_shuffled += request.metrics.per_step_accepted is None and len(rounds.accepted) > 1
        collected.sequence(request.name, request.domain, request.prompt_tokens, output_tokens, request.finish_reason)
        collected.positions(request.name, origin.drafter, filled.runs, filled.proposals)
    started = tally.starts_exact + tally.starts_open + tally.undrafted
    origin.own_undrafted(tally.undrafted / max(started, 1), str(sources[0].path))
    prompts = [prompt_source(one.path, one.domain, one.requests) for one in sources]
    said = [*notes, *_said(tally, longest, rates, origin, requests, sources)]
    manifest = origin.manifest(
        import_format,
        "histogram" if tally.requests_shuffled else "round",
        longest_draft=longest,
        prompts=prompts,
        seed=seed,
        unknown=[*_untold(tally, origin), *unknown],
        notes=said,
    )
    return TraceSet.build(manifest, collected.tables())


def _rounds(request: Request, rng: Generator) -> Rounds:
    """Give the rounds of a request, in the order reported or in one that is drawn."""
    metrics = request.metrics
    if metrics.per_step_accepted is not None and metrics.per_step_drafted is not None:
        rounds = rounds_of(metrics.per_step_accepted, metrics.per_step_drafted)
        wrong = np.flatnonzero(rounds.accepted > rounds.drafted)
        if len(wrong):
            step = int(wrong[0])
            raise TraceError(
                f"{request.place}: step {step}: must accept at most the {rounds.drafted[step]} token(s) drafted, "
                f"got {rounds.accepted[step]}"
            )
        return rounds
    if metrics.accepted_by_position is None:
        raise TraceError(f"{request.place}: neither rounds in order nor a histogram of accepted tokens is reported")
    over = np.array([metrics.drafts, *metrics.accepted_by_position, 0])
    accepted = rng.permutation(np.repeat(np.arange(len(over) - 1), -np.diff(over)))
    longest = metrics.draft_tokens_max or len(metrics.accepted_by_position)
    drafted = drafts_for(accepted, metrics.drafted_tokens, longest, rng)
    if drafted is None:
        raise TraceError(
            f"{request.place}: {metrics.drafts} drafts of at most {longest} tokens must have the histogram's rounds "
            f"inside them, got {metrics.drafted_tokens} drafted tokens"
        )
    return Rounds(accepted, drafted)


def _untold(tally: Tally, origin: Origin) -> list[str]:
    """Say what an import of rounds cannot know."""
    inside = tally.inside_known + tally.inside_drawn
    missing = [
        f"run lengths at {inside} of {tally.positions} positions: inside accepted drafts, where no round started; "
        + (
            "those that follow from the tokens accepted are exact if the drafter is greedy"
            if origin.sees_tokens_alone
            else f"estimated (exact only for drafters that see tokens alone; paradigm '{origin.paradigm}')"
        )
    ]
    if tally.starts_open:
        missing.append(
            f"run lengths at {tally.starts_open} starts: the whole draft was accepted and was shorter than others; "
            "the measured run is a lower bound, what follows is drawn"
        )
    if tally.requests_unplaced:
        missing.append(
            f"where rounds without a draft stood in {tally.requests_unplaced} request(s): engines do not count them; "
            "drawn, every place alike"
        )
    if tally.requests_shuffled:
        missing.append(
            f"the order of rounds in {tally.requests_shuffled} request(s): reported as a histogram; drawn, so "
            "burstiness within a request is lost"
        )
    return missing


def _said(
    tally: Tally,
    longest: int,
    rates: np.ndarray,
    origin: Origin,
    requests: Sequence[Request],
    sources: Sequence[Source],
) -> list[str]:
    """Put the counts of an import in words."""
    shown = ", ".join(f"{rate:.3f}" for rate in rates)
    lines = [
        f"run lengths at {tally.positions} positions of {tally.requests} requests: {tally.starts_exact} measured "
        f"where a round started, {tally.starts_open} measured as lower bounds, {tally.inside_known} that follow from "
        f"match bits, {tally.inside_drawn} that depend on a drawn bit, {tally.undrafted} where a round had no draft",
        f"longest draft {longest} tokens; conditional acceptance by depth: {shown}",
    ]
    if tally.undrafted and not origin.looks_up:
        lines.append(
            f"{tally.undrafted} rounds had no draft although the drafter always proposes: taken as the engine's "
            "choice, what the drafter would have got right there is drawn"
        )
    if tally.rounds_past_end:
        lines.append(f"{tally.rounds_past_end} rounds lie past the end of their output and are left out")
    unsized = sum(request.output_tokens is None for request in requests)
    if unsized:
        lines.append(f"{unsized} requests without a token count: taken to be as long as what their rounds emitted")
    lines += [f"{one.path.name}: {one.left_out} object(s) without rounds left out" for one in sources if one.left_out]
    return lines
