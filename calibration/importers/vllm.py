"""Import vLLM's speculation metrics of single requests (``--per-request-spec-decode-metrics``).

vLLM puts ``metrics.speculative_decoding`` into the answer (in the last chunk of a streamed one): ``detailed`` with
``per_step_accepted`` and ``per_step_drafted``, one entry per verification step, ``summary`` with the histogram alone.
Form and meaning: https://docs.vllm.ai/en/stable/features/speculative_decoding/acceptance_metrics/ and
https://github.com/vllm-project/vllm/pull/48915. Three things of it that matter here, from vLLM's scheduler:

* only steps that had drafted tokens are counted: rounds without a draft (n-gram lookup that found nothing) are not
  there, and are told from the number of output tokens;
* accepted tokens are counted before the output is cut at its end, so the last round may reach past it;
* drafted tokens that a grammar ruled out are taken off the draft.

Import what vLLM aggregates about speculation: its Prometheus counters, its log lines. Estimates, labelled so.

Counters (vLLM from 0.9 on, and llama.cpp with its own prefix), all unconditional and without the bonus token:
``vllm:spec_decode_num_drafts_total``, ``_num_draft_tokens_total``, ``_num_accepted_tokens_total`` and
``_num_accepted_tokens_per_pos_total{position="0"}``. Source: vllm/v1/spec_decode/metrics.py of vllm-project/vllm.

Log lines, every ten seconds or so, newest form first:

    SpecDecoding metrics: Mean acceptance length: 3.42, Current speculative depth: 3, Accepted throughput: ...,
        Drafted throughput: ..., Accepted: 676 tokens, Drafted: 837 tokens,
        Per-position acceptance rate: 0.921, 0.828, 0.674, Avg Draft acceptance rate: 80.8%
    SpecDecoding metrics: Draft acceptance rate: 80.8%, Mean acceptance length: 3.42, Accepted: 676 tokens,
        Drafted: 837 tokens, Per-position acceptance rate: 0.921, 0.828, 0.674
    SpecDecoding metrics: Draft acceptance rate: 80.8%, Accepted: 676 tokens, Drafted: 837 tokens
    Speculative metrics: Draft acceptance rate: 0.642, System efficiency: 0.598, Number of speculative tokens: 3,
        Number of accepted tokens: 8547, Number of draft tokens: 13311, Number of emitted tokens: 10616.

The last is the old engine's (V0, vLLM below 0.9): counts since the start, accepted tokens counted even behind a
rejection (https://github.com/vllm-project/vllm/issues/9539), so that only emitted tokens give the tokens per round.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from calibration.common.errors import CalibrationError, TraceError
from calibration.importers.aggregates import Lengths, law_note, spread_laws, spread_note, synthesize
from calibration.importers.origin import Origin, prompt_source
from calibration.importers.reading import Object, check_files, count, read_objects, read_text
from calibration.importers.requests import Request, Source, requests_to_traces
from calibration.importers.spec_totals import SpecTotals, totals_of
from calibration.observe.answer import SpecMetrics, read_spec_metrics
from calibration.observe.prometheus import difference, parse_counters
from calibration.traces import TraceSet

_FINISHED = ("stop", "length")


def import_vllm_requests(
    files: Sequence[str | os.PathLike[str]],
    *,
    origin: Origin | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> TraceSet:
    """Give the TraceSet of answers of vLLM with their speculation metrics, detailed or summary.

    `files`: JSON lines (or JSON lists) of whole answers or of their last chunks; each needs
    ``metrics.speculative_decoding`` and ``usage``. A line without metrics (``n`` > 1, say) is left out and counted.
    `origin`: what the answers do not say; with a lookup as `origin.paradigm`, drafts shorter than the longest are the
    drafter's own, else the engine's choice. `seed`: of what has to be drawn (see `calibration.importers.rounds`).

    Replay is exact with the recorded draft lengths where rounds are reported in order (``detailed``); the manifest
    counts what is exact, follows, or was drawn. Raises `TraceError` with file, line, rule and value.
    """
    check_files(files)
    origin = origin or Origin()
    requests: list[Request] = []
    sources = []
    for done, name in enumerate(files):
        if progress:
            progress(f"import {os.fspath(name)}", done, len(files))
        objects = read_objects(name)
        source, held = _read(name, objects, origin)
        if not held:
            raise TraceError(
                f"{source.path}: no answer holds metrics.speculative_decoding; "
                "was the server started with --per-request-spec-decode-metrics detailed?"
            )
        origin = origin.with_verifier(objects[0][1].get("model"))
        requests += held
        sources.append(source)
    if progress:
        progress("import", len(files), len(files))
    return requests_to_traces(
        requests, sources, "vllm per-request metrics (metrics.speculative_decoding)", origin=origin, seed=seed
    )


def _read(
    name: str | os.PathLike[str], objects: Sequence[tuple[str, Object]], origin: Origin
) -> tuple[Source, list[Request]]:
    path = Path(name)
    domain = origin.domain_of(path)
    held = []
    for index, (place, answer) in enumerate(objects):
        metrics = spec_metrics(answer, place)
        if metrics is None:
            continue
        usage = answer.get("usage") or answer
        tokens = usage.get("completion_tokens")
        held.append(
            Request(
                place=place,
                name=f"{path.stem}/{index}",
                domain=domain,
                prompt_tokens=count(usage, "prompt_tokens", place, 1),
                output_tokens=None if tokens is None else count(usage, "completion_tokens", place, 1),
                finish_reason=_finish(answer),
                metrics=metrics,
            )
        )
    return Source(path, domain, len(held), len(objects) - len(held)), held


def spec_metrics(answer: Object, place: str) -> SpecMetrics | None:
    """Read the speculation metrics of an answer; `TraceError` with its place where they contradict themselves."""
    try:
        return read_spec_metrics(answer)
    except CalibrationError as fault:
        raise TraceError(f"{place}: {fault}") from None


def _finish(answer: Object) -> str:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else answer
    reason = first.get("finish_reason") if isinstance(first, dict) else None
    return reason if reason in _FINISHED else "unknown"


_NEW, _OLD = "SpecDecoding metrics:", "Speculative metrics:"
_GEOMETRIC = (
    "acceptance by depth: not reported; ASSUMED to fall geometrically, with the reported mean accepted length and "
    "drafts of the given length"
)


def import_vllm_counters(
    after: str | os.PathLike[str],
    *,
    before: str | os.PathLike[str] | None = None,
    lengths: Lengths | None = None,
    requests: int | None = None,
    draft_tokens: int | None = None,
    request_std_tokens: float = 0.0,
    origin: Origin | None = None,
    seed: int = 0,
) -> TraceSet:
    """Give a TraceSet synthesised so that its replay has the acceptance that the counters in `after` tell.

    `after`, `before`: the text of ``/metrics`` when the run ended and began (None: the server began with it).
    `lengths`: prompt and output tokens of every request; default: as many requests as the counters saw finish, each
    with the mean lengths. `requests`: how many there were, where the counters do not say (llama.cpp's do not).
    `draft_tokens`: the configured draft length, needed where acceptance by position is not
    exposed. `request_std_tokens`: standard deviation between requests of their mean accepted length, which counters
    do not tell (see `spread_laws`); 0: all alike. `seed`: of the draws.

    Replay with drafts of up to the counted length gives the counted rates, mean length and, for lookups, share of
    rounds without a draft, within sampling error. Raises `TraceError` for text that is not Prometheus', counters that
    are missing or contradict themselves.
    """
    path, counters = _counters(after)
    if before is not None:
        try:
            counters = difference(_counters(before)[1], counters)
        except CalibrationError as fault:
            raise TraceError(f"{path}: {fault}") from None
    totals = totals_of(counters, str(path))
    return totals_to_traces(
        totals,
        path,
        "vllm prometheus counters (synthesised from aggregates)",
        lengths=lengths,
        requests=requests,
        draft_tokens=draft_tokens,
        request_std_tokens=request_std_tokens,
        origin=origin or Origin(),
        seed=seed,
    )


def import_vllm_log(
    log: str | os.PathLike[str],
    *,
    lengths: Lengths,
    draft_tokens: int | None = None,
    request_std_tokens: float = 0.0,
    origin: Origin | None = None,
    seed: int = 0,
) -> TraceSet:
    """Give a TraceSet synthesised so that its replay has the acceptance that vLLM's `log` states.

    All ``SpecDecoding metrics:`` lines are pooled, each weighted by its drafts (accepted tokens over the sum of its
    rates, which are rounded to 0.001); of the old ``Speculative metrics:`` lines the last one counts.
    `lengths`: prompt and output tokens of every request, which a log does not tell. `draft_tokens`: needed where the
    lines have no acceptance by position. The rest as for `import_vllm_counters`.

    Raises `TraceError` with file and line for a line that does not keep its form.
    """
    path, text = read_text(log)
    totals, notes = _log_totals(path, text, draft_tokens)
    return totals_to_traces(
        totals,
        path,
        "vllm log lines (synthesised from aggregates)",
        lengths=lengths,
        draft_tokens=draft_tokens,
        request_std_tokens=request_std_tokens,
        origin=origin or Origin(),
        seed=seed,
        notes=notes,
    )


def totals_to_traces(
    totals: SpecTotals,
    path: Path,
    import_format: str,
    *,
    lengths: Lengths | None,
    draft_tokens: int | None,
    request_std_tokens: float,
    origin: Origin,
    seed: int,
    requests: int | None = None,
    unknown: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> TraceSet:
    """Give the TraceSet synthesised from `totals`; `path` is the file that it imports.

    What was not counted is taken from `lengths` and `requests`: with the output tokens they tell the rounds without a
    draft.
    """
    if totals.drafts > 0:
        totals.check_outputs()
    totals = totals.known_from(requests, lengths)
    sizes = totals.lengths() if lengths is None else lengths
    law = totals.law(origin, draft_tokens)
    rng = np.random.default_rng(seed)
    untold = [spread_note(request_std_tokens), *unknown]
    if lengths is None:
        untold.append("lengths of single requests: counters hold sums; every request has the mean")
    if totals.by_position is None:
        untold.append(_GEOMETRIC)
    domain = origin.domain_of(path)
    return synthesize(
        sizes,
        spread_laws(law, sizes, request_std_tokens, rng),
        import_format,
        origin=origin,
        seed=seed,
        rng=rng,
        prompts=(prompt_source(path, domain, len(sizes)),),
        domain=domain,
        unknown=untold,
        notes=(law_note(law, totals.drafts), *totals.remarks(origin.looks_up), *notes),
    )


def _counters(file: str | os.PathLike[str]) -> tuple[Path, dict[str, float]]:
    path, text = read_text(file)
    try:
        return path, parse_counters(text)
    except CalibrationError as fault:
        raise TraceError(f"{path}: {fault}") from None


def _log_totals(path: Path, text: str, draft_tokens: int | None) -> tuple[SpecTotals, list[str]]:
    """Pool the lines of a log; also give notes of what was left out."""
    lines, notes = _whole_lines(text)
    new, old, idle = [], [], 0
    for number, line in lines:
        place = f"{path}:{number}"
        if _NEW in line:
            told = line.split(_NEW, 1)[1]
            if _number(told, r"Drafted: (\d+) tokens", place) == 0:
                idle += 1  # an interval without a draft: its rates are nan
            else:
                new.append(_new_line(told, place, draft_tokens))
        elif _OLD in line:
            old.append(_old_line(line.split(_OLD, 1)[1], place))
    if not new and not old:
        missing = "only lines without a draft" if idle else f"no line holds '{_NEW}' or '{_OLD}'"
        raise TraceError(f"{path}: {missing}; is this a log of vLLM with speculation on?")
    if new and old:
        raise TraceError(f"{path}: must be the log of one server, got lines of vLLM's present and of its old engine")
    back = next(
        (after.place for before, after in pairwise(old) if after.drafted_tokens < before.drafted_tokens), None
    )
    if back is not None:
        raise TraceError(f"{back}: counts since the start must not go back; was the server restarted? cut the log")
    if idle:
        notes.append(f"{idle} line(s) of intervals in which nothing was drafted: they add nothing")
    if not new:
        return old[-1], notes
    longest = max(len(one.by_position or ()) for one in new)
    positions = np.zeros(longest)
    for one in new:
        positions[: len(one.by_position or ())] += one.by_position or ()
    if longest and any(one.by_position is None for one in new):
        raise TraceError(f"{path}: either all lines must hold 'Per-position acceptance rate' or none")
    totals = SpecTotals(
        str(path),
        sum(one.drafts for one in new),
        sum(one.drafted_tokens for one in new),
        sum(one.accepted_tokens for one in new),
        tuple(positions.tolist()) if longest else None,
        exact=False,
    )
    return totals, notes


def _whole_lines(text: str) -> tuple[list[tuple[int, str]], list[str]]:
    """Give the numbered lines that speak of speculation; the last line of a log that was cut off is left out.

    A last line without its line break is whole only if it has the form of the one before: the same words, and numbers
    with as many decimals.
    """
    told = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if _NEW in line or _OLD in line]
    if not told or text.endswith(("\n", "\r")) or told[-1][0] != len(text.splitlines()):
        return told, []
    number, last = told[-1]
    forms = {_form(line) for _, line in told[:-1]}
    if not forms or _form(last) in forms:
        return told, []
    return told[:-1], [f"line {number}, the last one, is not finished: left out"]


def _form(line: str) -> str:
    """The words of a line, every digit behind a point as 0, whole numbers as one 0."""
    spoken = line[max(line.find(_NEW), line.find(_OLD)) :].replace("nan", "0.0")
    return re.sub(r"\d+(\.\d+)?", lambda found: re.sub(r"\d", "0", "0" + (found[1] or "")), spoken)


def _new_line(text: str, place: str, draft_tokens: int | None) -> SpecTotals:
    """Read one line of vLLM's present engine."""
    accepted, drafted = (
        _number(text, r"Accepted: (\d+) tokens", place),
        _number(text, r"Drafted: (\d+) tokens", place),
    )
    found = re.search(r"Per-position acceptance rate:((?:\s*[0-9.]+,?)+)", text)
    if found is None:
        if draft_tokens is None:
            raise TraceError(f"{place}: 'Per-position acceptance rate' is missing; give the configured draft length")
        return SpecTotals(place, drafted / draft_tokens, drafted, accepted)
    rates = [float(rate) for rate in re.findall(r"\d+\.\d+", found[1])]
    mean = re.search(r"Mean acceptance length: (\d+\.\d+)", text)
    if mean is not None and abs(float(mean[1]) - 1 - sum(rates)) > 0.005 + 0.0006 * len(rates):  # both are rounded
        raise TraceError(
            f"{place}: 'Mean acceptance length' must be 1 + the rates by position ({1 + sum(rates):.3f}), got "
            f"{mean[1]}; was the line cut off?"
        )
    # Rates are accepted / drafts, rounded: their sum is more exact than the mean length in the line (two decimals).
    full = drafted / max(len(rates), 1)
    drafts = accepted / sum(rates) if sum(rates) > 0 else full
    if abs(drafts / full - 1) <= 0.0006 * len(rates) / max(
        sum(rates), 0.0006
    ):  # as rounding allows: all drafts are full
        drafts = full
    return SpecTotals(place, drafts, drafted, accepted, tuple(rate * drafts for rate in rates))


def _old_line(text: str, place: str) -> SpecTotals:
    """Read one line of vLLM's old engine: emitted tokens, over rounds, hold the bonus token."""
    length = _number(text, r"Number of speculative tokens: (\d+)", place)
    drafted = _number(text, r"Number of draft tokens: (\d+)", place)
    emitted = _number(text, r"Number of emitted tokens: (\d+)", place)
    if length < 1:
        raise TraceError(f"{place}: 'Number of speculative tokens' must be >= 1, got {length:g}")
    rounds = drafted / length
    return SpecTotals(place, rounds, drafted, emitted - rounds, draft_tokens=round(length), exact=False)


def _number(text: str, pattern: str, place: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        name = pattern.split(":")[0]
        raise TraceError(f"{place}: '{name}: NUMBER' must be in the line, got '{text.strip()[:80]}'")
    return float(found[1])
