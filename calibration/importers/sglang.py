"""Import what SGLang reports of speculation: per request, in its server info, its benchmark results and its log.

* Answers of ``/generate``, or of chat completions with ``return_meta_info`` or ``return_spec_tokens_details``:
  ``meta_info`` (or ``sglext.spec_tokens_details``) with ``spec_verify_ct`` (rounds), accepted drafts
  (``spec_num_correct_drafts``; earlier ``spec_accepted_drafts``, ``spec_accept_token_num``) and a histogram
  (``spec_correct_drafts_histogram``; earlier ``spec_accept_histogram``), element j = rounds that accepted j drafts.
  ``spec_accept_length`` = ``completion_tokens`` / ``spec_verify_ct`` holds the bonus *and* the token of prefill.
  Pull requests 3152, 11441, 18332 and 33518 of https://github.com/sgl-project/sglang.
* ``/server_info`` (``/get_server_info``): ``internal_states[].avg_spec_accept_length``, a mean since the start, bonus
  included. ``bench_serving`` copies it as ``accept_length``.
* Log: ``Decode batch, #running-req: 4, ..., accept len: 2.36, accept rate: 0.19, ...``; accept len holds the bonus.
  accept rate is not used: its denominator has changed between versions.

``speculative_num_draft_tokens`` counts the nodes verified, the root among them, so a chain has one draft less; a
block drafter (DFLASH) makes all of them in one of ``speculative_num_steps``. Trees (``speculative_eagle_topk`` above
1) are refused: their verification costs every node. ``bench_serving`` appends its results to the file; each is a run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from calibration.common.errors import TraceError
from calibration.importers.aggregates import (
    AcceptanceLaw,
    Lengths,
    geometric_law,
    law_note,
    spread_laws,
    spread_note,
    synthesize,
)
from calibration.importers.origin import Origin, prompt_source
from calibration.importers.reading import Object, count, counts, read_objects, read_text
from calibration.importers.requests import Request, Source, requests_to_traces
from calibration.importers.sglang_reports import Answer, RunMean, is_json, read_answer, read_log, read_run
from calibration.observe.request_metrics import SpecMetrics
from calibration.traces import TraceSet

_CORRECT = ("spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num")
_HISTOGRAM = ("spec_correct_drafts_histogram", "spec_accept_histogram")
_GEOMETRIC = (
    "acceptance by depth: not reported; ASSUMED to fall geometrically, with the reported mean and longest draft"
)


def import_sglang(
    report: str | os.PathLike[str],
    *,
    lengths: Lengths | None = None,
    draft_tokens: int | None = None,
    run: int | None = None,
    request_std_tokens: float = 0.0,
    origin: Origin | None = None,
    seed: int = 0,
) -> TraceSet:
    """Give the TraceSet of an SGLang `report`; which kind it is shows in its content.

    * JSON lines of answers with histograms: rounds are exact but for their order, which is drawn.
    * JSON lines of answers without: made up, a geometric law per request with its own mean.
    * Server info, a result of ``bench_serving``, or a log: made up, one geometric law with the stated mean.

    `lengths`: prompt and output tokens of every request, needed for server info and logs. `draft_tokens`: longest
    chain of drafts; default: as the report says (its server arguments, or the histograms' length). `run`: which one,
    from 1, where the file holds several results of ``bench_serving``.
    `request_std_tokens` as in `import_vllm_counters`; only where one law serves all requests.

    Raises `TraceError` with file, line, rule and value, and where something is missing that must be given.
    """
    origin = origin or Origin()
    path, text = read_text(report)
    if draft_tokens is not None and draft_tokens < 1:
        raise TraceError(f"draft_tokens: must be >= 1, got {draft_tokens}")
    if not is_json(text):
        if run is not None:
            raise TraceError(f"{path}: is a log, so run must not be given")
        return _one_law(path, read_log(path, text), lengths, draft_tokens, request_std_tokens, origin, seed)
    objects = read_objects(report)
    answers = [found for place, one in objects if (found := read_answer(one, place)) is not None]
    if not answers:
        return _one_law(path, _which(path, objects, run), lengths, draft_tokens, request_std_tokens, origin, seed)
    for name, value in (("lengths", lengths), ("request_std_tokens", request_std_tokens or None), ("run", run)):
        if value is not None:
            raise TraceError(f"{path}: holds requests of its own, so {name} must not be given")
    source = Source(path, origin.domain_of(path), len(answers), len(objects) - len(answers))
    histograms = [_histogram(one) for one in answers]
    if all(histograms):
        return _from_histograms(source, answers, [one or () for one in histograms], draft_tokens, origin, seed)
    return _from_means(source, answers, draft_tokens, origin, seed)


def _which(path: Path, objects: Sequence[tuple[str, Object]], run: int | None) -> RunMean:
    """Give the one run that the file holds, or that was asked for."""
    if run is None and len(objects) > 1:
        means = ", ".join(f"{read_run(whole, place).accept_length:g}" for place, whole in objects)
        raise TraceError(
            f"{path}: holds {len(objects)} runs with mean accepted lengths of {means}; say which (--run 1 to "
            f"{len(objects)})"
        )
    if run is not None and not 1 <= run <= len(objects):
        raise TraceError(f"{path}: run must lie in [1, {len(objects)}], got {run}")
    place, whole = objects[(run or 1) - 1]
    return read_run(whole, place)


def _one_law(
    path: Path,
    run: RunMean,
    lengths: Lengths | None,
    draft_tokens: int | None,
    request_std_tokens: float,
    origin: Origin,
    seed: int,
) -> TraceSet:
    """Make up requests whose rounds all follow the geometric law of the run's mean."""
    run.check_chain(str(path))
    if draft_tokens is not None and run.longest is not None and draft_tokens != run.longest:
        raise TraceError(
            f"{path}: draft_tokens must be the {run.longest} that the server's arguments give, got {draft_tokens}"
        )
    longest, sizes = draft_tokens or run.longest, lengths or run.lengths
    if longest is None:
        raise TraceError(f"{path}: does not say how long drafts were; give draft_tokens (speculative_num_steps)")
    if sizes is None:
        raise TraceError(f"{path}: does not say how many requests there were and how long; give their lengths")
    law = geometric_law(run.accept_length - 1, longest, str(path))
    rng = np.random.default_rng(seed)
    domain = origin.domain_of(path)
    return synthesize(
        sizes,
        spread_laws(law, sizes, request_std_tokens, rng),
        f"{run.kind} (made up from a mean accepted length)",
        origin=run.named(origin),
        seed=seed,
        rng=rng,
        prompts=(prompt_source(path, domain, len(sizes)),),
        domain=domain,
        unknown=(_GEOMETRIC, spread_note(request_std_tokens)),
        notes=(law_note(law), *run.notes),
    )


def _histogram(answer: Answer) -> tuple[int, ...] | None:
    """Give the rounds by accepted drafts; that of an answer without rounds is known, the other way it is None."""
    found = (counts(answer.meta, key, answer.place) for key in _HISTOGRAM)
    none = (0,) if answer.meta.get("spec_verify_ct") == 0 else None
    return next((one for one in found if one), none)


def _from_histograms(
    source: Source,
    answers: Sequence[Answer],
    histograms: Sequence[tuple[int, ...]],
    draft_tokens: int | None,
    origin: Origin,
    seed: int,
) -> TraceSet:
    """Give requests whose rounds are known but for their order."""
    longest = draft_tokens or max(max(len(one) for one in histograms) - 1, 1)
    requests = [
        Request(
            answer.place,
            f"{source.path.stem}/{index}",
            source.domain,
            *answer.size,
            answer.finish_reason,
            _spec(histogram, longest, answer.place),
        )
        for index, (answer, histogram) in enumerate(zip(answers, histograms, strict=True))
    ]
    notes = () if draft_tokens else (f"drafts taken to be chains of {longest} tokens, as deep as the histograms",)
    return requests_to_traces(
        requests, [source], "sglang per-request histograms", origin=origin, seed=seed, notes=notes
    )


def _spec(histogram: Sequence[int], longest: int, place: str) -> SpecMetrics:
    """Give the rounds of a histogram, each with a draft of `longest` tokens."""
    deepest = max((accepted for accepted, rounds in enumerate(histogram) if rounds), default=0)
    if deepest > longest:
        raise TraceError(f"{place}: rounds must accept at most {longest} token(s), got {deepest}")
    held = np.zeros(longest + 1, dtype=np.int64)
    held[: deepest + 1] = histogram[: deepest + 1]
    over = np.cumsum(held[::-1])[::-1][1:]
    drafts = int(held.sum())
    return SpecMetrics(
        drafts,
        drafts * longest,
        int(over.sum()),
        accepted_by_position=tuple(over.tolist()),
        draft_tokens_max=longest,
    )


def _from_means(
    source: Source, answers: Sequence[Answer], draft_tokens: int | None, origin: Origin, seed: int
) -> TraceSet:
    """Make up requests, each with the geometric law of its own mean."""
    notes = [
        "every request has its own mean accepted length: variance between requests is that of the report, and what "
        "chance adds to it"
    ]
    if source.left_out:
        notes.append(f"{source.path.name}: {source.left_out} object(s) without rounds left out")
    told = [_rounds(answer) for answer in answers]
    lone = [max(answer.size[1] - 1 - sum(one), 0) for answer, one in zip(answers, told, strict=True)]
    rounds = sum(one[0] for one in told)
    origin.own_undrafted(sum(lone) / max(sum(lone) + rounds, 1), str(source.path))
    return synthesize(
        [answer.size for answer in answers],
        [
            _request_law(
                answer, *one, undrafted / max(undrafted + one[0], 1) if origin.looks_up else 0.0, draft_tokens
            )
            for answer, one, undrafted in zip(answers, told, lone, strict=True)
        ],
        "sglang per-request means (made up from mean accepted lengths)",
        origin=origin,
        seed=seed,
        rng=np.random.default_rng(seed),
        prompts=(prompt_source(source.path, source.domain, source.requests),),
        domain=source.domain,
        unknown=(_GEOMETRIC,),
        notes=notes,
    )


def _rounds(answer: Answer) -> tuple[int, int]:
    """Give the rounds of a request and how many drafted tokens they accepted."""
    meta, place, tokens = answer.meta, answer.place, answer.size[1]
    rounds = count(meta, "spec_verify_ct", place)
    accepted = next((count(meta, key, place) for key in _CORRECT if meta.get(key) is not None), None)
    if rounds > tokens:  # Every round gives a token; one that was scheduled ahead may come after the end.
        raise TraceError(f"{place}: spec_verify_ct must be at most the {tokens} completion_tokens, got {rounds}")
    if accepted is None:  # The first token is prefill's; what is left are rounds with a bonus token each.
        accepted = max(tokens - 1 - rounds, 0)
    return rounds, accepted


def _request_law(
    answer: Answer, rounds: int, accepted: int, undrafted: float, draft_tokens: int | None
) -> AcceptanceLaw:
    """Give the geometric law of one request's mean accepted length."""
    if draft_tokens is None:
        raise TraceError(f"{answer.place}: has no histogram; give draft_tokens (speculative_num_steps)")
    past = 1 + rounds + accepted - answer.size[1]
    if accepted and past > draft_tokens + 1:
        raise TraceError(
            f"{answer.place}: completion_tokens must be at least 1 + rounds + accepted tokens "
            f"({1 + rounds + accepted}), less what the last round reaches past the end, got {answer.size[1]}"
        )
    if rounds == 0:
        return AcceptanceLaw((0.0,) * draft_tokens, undrafted)
    law = geometric_law(accepted / rounds, draft_tokens, answer.place)
    return replace(law, undrafted=undrafted)
