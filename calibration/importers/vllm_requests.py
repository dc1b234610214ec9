"""Import vLLM's speculation metrics of single requests (``--per-request-spec-decode-metrics``).

vLLM puts ``metrics.speculative_decoding`` into the answer (in the last chunk of a streamed one): ``detailed`` with
``per_step_accepted`` and ``per_step_drafted``, one entry per verification step, ``summary`` with the histogram alone.
Form and meaning: https://docs.vllm.ai/en/stable/features/speculative_decoding/acceptance_metrics/ and
https://github.com/vllm-project/vllm/pull/48915. Three things of it that matter here, from vLLM's scheduler:

* only steps that had drafted tokens are counted: rounds without a draft (n-gram lookup that found nothing) are not
  there, and are told from the number of output tokens;
* accepted tokens are counted before the output is cut at its end, so the last round may reach past it;
* drafted tokens that a grammar ruled out are taken off the draft.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from calibration.common.errors import CalibrationError, TraceError
from calibration.importers.origin import Origin
from calibration.importers.reading import Object, check_files, count, read_objects
from calibration.importers.requests import Request, Source, requests_to_traces
from calibration.observe.request_metrics import SpecMetrics, read_spec_metrics
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
