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

The shapes in which SGLang reports speculation, read into one: answers with their counts, or one mean of a run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.common.errors import TraceError
from calibration.importers.aggregates import (
    AcceptanceLaw,
    Lengths,
    even_lengths,
    geometric_law,
    law_note,
    spread_laws,
    spread_note,
    synthesize,
)
from calibration.importers.origin import Origin, prompt_source
from calibration.importers.reading import Object, count, counts, measure, read_objects, read_text
from calibration.importers.requests import Request, Source, requests_to_traces
from calibration.observe.answer import SpecMetrics
from calibration.traces import TraceSet
from calibration.traces.paradigms import paradigm_of


@dataclass(frozen=True)
class Answer:
    """One answer: its lengths in tokens, why it ended, and the object that holds its counts."""

    place: str
    size: tuple[int, int]
    finish_reason: str
    meta: Object


@dataclass(frozen=True)
class RunMean:
    """What a report says of a whole run. `accept_length` holds the bonus token; None: not said.

    `arguments`: objects that may hold the server's arguments.
    """

    kind: str
    accept_length: float
    arguments: tuple[Object, ...]
    lengths: Lengths | None = None
    notes: tuple[str, ...] = ()

    @property
    def longest(self) -> int | None:
        """Give the longest chain of drafts that the server's arguments allow; None where they do not tell.

        Of a chain all tokens verified but the root are drafts, also where a block is drafted in one step (DFLASH).
        """
        nodes, steps = self._argument("speculative_num_draft_tokens"), self._argument("speculative_num_steps")
        if nodes is not None and nodes > 1:
            return nodes - 1
        return steps if steps else None

    def check_chain(self, place: str) -> None:
        """Refuse trees: their verification costs all their nodes, and a mean length does not say how they branch."""
        width, nodes = self._argument("speculative_eagle_topk"), self._argument("speculative_num_draft_tokens")
        steps = self._argument("speculative_num_steps")
        if width is None and nodes is not None and steps is not None and nodes - 1 != steps and not self._one_shot():
            raise TraceError(
                f"{place}: {nodes} tokens verified after {steps} steps of drafting are no chain, and "
                "speculative_eagle_topk, which says how drafts branch, is not reported; give a report with all "
                "arguments"
            )
        if width is not None and width > 1:
            size = "" if nodes is None else f" of {nodes} nodes, the root included"
            depth = "" if steps is None else f", {steps} deep"
            raise TraceError(
                f"{place}: drafts are trees{size}{depth} (speculative_eagle_topk = {width}), whose verification "
                "costs every node; a mean length tells enough of chains alone (speculative_eagle_topk = 1)"
            )

    def _one_shot(self) -> bool:
        names = (one.get("speculative_algorithm") for one in self.arguments)
        return any(isinstance(name, str) and paradigm_of(name).one_shot for name in names)

    def _argument(self, key: str) -> int | None:
        found = (one.get(key) for one in self.arguments)
        return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)

    def named(self, origin: Origin) -> Origin:
        """Give `origin` with the names in the server's arguments, where the user did not give them."""
        for one in self.arguments:
            origin = origin.with_verifier(one.get("model_path"))
            algorithm = one.get("speculative_algorithm")
            if origin.paradigm == "unknown" and isinstance(algorithm, str):
                origin = replace(origin, paradigm=algorithm.lower())
        return origin


_IS = r"['\"]?\s*[=:]\s*"
"""Between the name of an argument and its value: keyword arguments, a dict, JSON."""


def is_json(text: str) -> bool:
    """Say whether `text` is JSON or JSON lines: whether it, or its first line, can be read as such."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    for part in (first, text):
        try:
            json.loads(part)
        except json.JSONDecodeError:
            continue
        return True
    return False


def read_answer(answer: Object, place: str) -> Answer | None:
    """Read one answer; None where it holds no ``spec_verify_ct``."""
    meta = _meta(answer)
    if meta is None:
        return None
    usage = answer.get("usage")
    held = {**(usage if isinstance(usage, Mapping) else {}), **meta}
    size = count(held, "prompt_tokens", place, 1), count(held, "completion_tokens", place, 1)
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, Mapping) else reason
    return Answer(place, size, kind if kind in ("stop", "length") else "unknown", meta)


def _meta(answer: Object) -> Object | None:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    extension = answer.get("sglext")
    details = extension.get("spec_tokens_details") if isinstance(extension, Mapping) else None
    for found in (answer.get("meta_info"), first.get("meta_info"), details):
        if isinstance(found, Mapping) and found.get("spec_verify_ct") is not None:
            return found
    return None


def read_run(whole: Object, place: str) -> RunMean:
    """Read a server info, or a result of ``bench_serving``."""
    states = _states(whole)
    if "accept_length" in whole:
        length = measure(whole, "accept_length", place, 1)
        return RunMean("sglang bench_serving", length, (whole, *states), _bench_lengths(whole, place))
    named = "avg_spec_accept_length"
    means = [measure(state, named, place, 1) for state in states if state.get(named) is not None]
    if not means:
        raise TraceError(
            f"{place}: meta_info.spec_verify_ct, internal_states[].{named} or accept_length must be there; is this a "
            "report of SGLang with speculation on?"
        )
    notes = ["mean accepted length since the server started, all its traffic included"]
    if len(means) > 1:
        notes.append(f"unweighted mean over {len(means)} schedulers")
    return RunMean("sglang server info", sum(means) / len(means), (whole, *states), notes=tuple(notes))


def _states(whole: Object) -> list[Object]:
    """Give a server info, which may stand in a benchmark result, and the states of its schedulers.

    Where prefill and decoding are apart, those of all the servers that decode.
    """
    info = whole.get("server_info")
    info = info if isinstance(info, Mapping) else whole
    decode = info.get("decode")
    servers = [one for one in decode if isinstance(one, Mapping)] if isinstance(decode, list) else []
    found: list[Object] = []
    for server in servers or [info]:
        states = server.get("internal_states")
        found += (
            [server, *(one for one in states if isinstance(one, Mapping))] if isinstance(states, list) else [server]
        )
    return found


def _bench_lengths(whole: Object, place: str) -> Sequence[tuple[int, int]] | None:
    inputs, outputs = counts(whole, "input_lens", place), counts(whole, "output_lens", place)
    if inputs and outputs and len(inputs) == len(outputs):
        return [size for size in zip(inputs, outputs, strict=True) if min(size) > 0]
    if "completed" not in whole:
        return None
    return even_lengths(
        count(whole, "completed", place, 1),
        count(whole, "total_input_tokens", place, 1),
        count(whole, "total_output_tokens", place, 1),
        place,
    )


def read_log(path: Path, text: str) -> RunMean:
    """Read a log: the mean accept len of its decode lines, weighted by running requests."""
    weighted = total = 0.0
    notes = ["accept len of log lines, weighted by running requests: rounds are not counted there"]
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if "Decode batch" not in line or "accept len:" not in line:
            continue
        length = re.search(r"accept len: (\d+(?:\.\d+)?)(?=[^\d.])", line)
        if length is None and not line.endswith(("\n", "\r")):
            notes.append(f"line {number}, the last one, is not finished: left out")
            continue
        running = re.search(r"#running-req: (\d+)", line)
        if length is None or running is None:
            raise TraceError(f"{path}:{number}: '#running-req: N' and 'accept len: X' must be in the line")
        weighted += float(length[1]) * int(running[1])
        total += int(running[1])
    if total == 0:
        raise TraceError(f"{path}: no 'Decode batch' line holds 'accept len:'; is this a log with speculation on?")
    return RunMean("sglang log", weighted / total, (_logged_arguments(path, text),), notes=tuple(notes))


def _logged_arguments(path: Path, text: str) -> Object:
    """Read the server's arguments; `TraceError` where the log holds several servers with others."""
    found: dict[str, Any] = {}
    numbers = ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")
    for key in (*numbers, "model_path", "speculative_algorithm"):
        value = r"(\d+)" if key in numbers else r"['\"]([^'\"]+)['\"]"
        told = list(dict.fromkeys(re.findall(rf"\b{key}{_IS}{value}", text)))
        if len(told) > 1:
            raise TraceError(f"{path}: must be the log of one server, got {key} = {' and '.join(told)}; cut the log")
        if told:
            found[key] = int(told[0]) if key in numbers else told[0]
    return found


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
    * JSON lines of answers without: synthesised, a geometric law per request with its own mean.
    * Server info, a result of ``bench_serving``, or a log: synthesised, one geometric law with the stated mean.

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
        return _one_law(
            path=path,
            run=read_log(path, text),
            lengths=lengths,
            draft_tokens=draft_tokens,
            request_std_tokens=request_std_tokens,
            origin=origin,
            seed=seed,
        )
    objects = read_objects(report)
    answers = [found for place, one in objects if (found := read_answer(one, place)) is not None]
    if not answers:
        return _one_law(
            path=path,
            run=_which(path, objects, run),
            lengths=lengths,
            draft_tokens=draft_tokens,
            request_std_tokens=request_std_tokens,
            origin=origin,
            seed=seed,
        )
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
        f"{run.kind} (synthesised from a mean accepted length)",
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
        "sglang per-request means (synthesised from mean accepted lengths)",
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
