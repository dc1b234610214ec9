"""Import exports of AIPerf (ai-dynamo/aiperf): lengths always, acceptance where the server reported it.

``profile_export.jsonl`` (``--export-level records``) holds one record a request: ``metadata``, ``metrics`` (each
``{value, unit}``), ``error`` and, where the server reported it per request, ``spec_decode_acceptance`` with the
counts, a sparse ``acceptance_histogram`` and maybe ``per_step_accepted`` and ``per_step_drafted``.
``profile_export_aiperf.json`` holds means and percentiles of the run and, with speculation,
``pooled_spec_decode_acceptance_histogram``. ``server_metrics_export.json`` holds the increase of every server counter
(``metrics[name].series[].stats.total``). Sources: docs/reference/json-export-schema.md,
docs/reference/spec-decode-acceptance.md, docs/tutorials/spec-decode-metrics.md and
docs/server-metrics/server-metrics-json-schema.md of https://github.com/ai-dynamo/aiperf.

A TraceSet has no place for latencies of requests: their means are noted in the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.common.errors import TraceError
from calibration.importers.aggregates import (
    AcceptanceLaw,
    Lengths,
    acceptance_law,
    even_lengths,
    law_note,
    spread_laws,
    spread_note,
    synthesize,
)
from calibration.importers.origin import Origin, prompt_source
from calibration.importers.reading import Object, check_object, count, measure, read_objects
from calibration.importers.requests import Request, Source, requests_to_traces
from calibration.importers.spec_totals import SpecTotals, totals_of
from calibration.importers.vllm import spec_metrics, totals_to_traces
from calibration.traces import TraceSet

_LATENCIES = ("time_to_first_token", "inter_token_latency", "request_latency")
_POOLED = "pooled_spec_decode_acceptance_histogram"


def import_aiperf(
    export: str | os.PathLike[str],
    *,
    server_metrics: str | os.PathLike[str] | None = None,
    rates: Sequence[float] | None = None,
    undrafted: float | None = None,
    request_std_tokens: float = 0.0,
    origin: Origin | None = None,
    seed: int = 0,
) -> TraceSet:
    """Give the TraceSet of an AIPerf `export`: ``profile_export.jsonl`` or ``profile_export_aiperf.json``.

    Acceptance comes from the export itself where it holds it: per request with rounds in order (exact as
    `import_vllm_requests` is), per request as a histogram, or pooled over the run. Where it does not, it is asked
    for: `server_metrics` (AIPerf's ``server_metrics_export.json`` of a vLLM server) or `rates`, unconditional
    acceptance by draft position as the user states it; run lengths are then synthesised from these aggregates,
    labelled. Beside the rates of a lookup stands `undrafted`, the share of rounds in which it found nothing.
    `request_std_tokens` as in `import_vllm_counters`; only for aggregates. Requests that failed, were cancelled or
    belong to the warm-up are left out.

    Raises `TraceError` with file, line, rule and value; also for `rates` or `server_metrics` that nothing needs.
    """
    origin = origin or Origin()
    objects, path = read_objects(export), Path(export)
    run = _records(path, objects, origin) if "metadata" in objects[0][1] else _summary(*_only(objects, path))
    _check_given(path, run, rates, server_metrics, request_std_tokens)
    if undrafted is not None and rates is None:
        raise TraceError(f"{path}: undrafted must be given with rates alone, else it is counted")
    if run.requests:
        source = Source(path, origin.domain_of(path), len(run.requests), len(objects) - len(run.requests))
        return requests_to_traces(
            run.requests, [source], "aiperf records", origin=origin, seed=seed, unknown=run.unknown, notes=run.notes
        )
    if rates is not None:
        law = acceptance_law(rates, "rates", undrafted=_stated_undrafted(undrafted, origin))
        return _stated(law, run, path, request_std_tokens, origin, seed)
    totals = run.pooled if server_metrics is None else _server_totals(server_metrics)
    if totals is None:
        raise TraceError(
            f"{path}: holds no acceptance (spec_decode_acceptance); give server_metrics (server_metrics_export.json) "
            "or rates (unconditional acceptance by draft position)"
        )
    return totals_to_traces(
        totals,
        path,
        "aiperf (synthesised from aggregates)",
        lengths=run.lengths,
        draft_tokens=None,
        request_std_tokens=request_std_tokens,
        origin=origin,
        seed=seed,
        unknown=run.unknown,
        notes=run.notes,
    )


@dataclass(frozen=True)
class _Run:
    """What an export holds."""

    lengths: Lengths
    notes: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    requests: tuple[Request, ...] = ()
    pooled: SpecTotals | None = None


def _check_given(
    path: Path,
    run: _Run,
    rates: Sequence[float] | None,
    server_metrics: str | os.PathLike[str] | None,
    request_std_tokens: float,
) -> None:
    """Refuse what nothing would use."""
    given = [name for name, value in (("rates", rates), ("server_metrics", server_metrics)) if value is not None]
    if len(given) == 2:
        raise TraceError("import: must be given rates or server_metrics, got both")
    if given and (run.requests or run.pooled is not None):
        raise TraceError(f"{path}: holds acceptance itself, so {given[0]} must not be given")
    if run.requests and request_std_tokens:
        raise TraceError(f"{path}: holds acceptance per request, so request_std_tokens must not be given")


def _only(objects: Sequence[tuple[str, Object]], path: Path) -> tuple[str, Object]:
    """Give the one object of an export that holds one."""
    if len(objects) > 1:
        raise TraceError(f"{path}: must hold one run, got {len(objects)}; give a file with one of them")
    return objects[0]


def _stated_undrafted(undrafted: float | None, origin: Origin) -> float:
    """Give the share of rounds without a draft that goes with rates, which do not tell it."""
    if undrafted is None and (origin.looks_up or not origin.paradigm_known):
        raise TraceError(
            "rates: count the rounds that had a draft, and do not tell how many had none; give --paradigm eagle3 (or "
            "draft_model, medusa, mtp ...) for a drafter that always proposes, and for a lookup --undrafted SHARE"
        )
    if undrafted and origin.paradigm_known and not origin.looks_up:
        raise TraceError(
            f"undrafted: must be 0 for a drafter that always proposes (paradigm '{origin.paradigm}'), got "
            f"{undrafted:g}"
        )
    return undrafted or 0.0


def _stated(
    law: AcceptanceLaw, run: _Run, path: Path, request_std_tokens: float, origin: Origin, seed: int
) -> TraceSet:
    rng = np.random.default_rng(seed)
    domain = origin.domain_of(path)
    return synthesize(
        run.lengths,
        spread_laws(law, run.lengths, request_std_tokens, rng),
        "aiperf lengths, acceptance given by the user",
        origin=origin,
        seed=seed,
        rng=rng,
        prompts=(prompt_source(path, domain, len(run.lengths)),),
        domain=domain,
        unknown=("acceptance: not in the export; GIVEN BY THE USER", spread_note(request_std_tokens), *run.unknown),
        notes=(law_note(law), *run.notes),
    )


def _records(path: Path, objects: Sequence[tuple[str, Object]], origin: Origin) -> _Run:
    """Read per-request records; requests only where at least one holds acceptance."""
    lengths, requests, latencies, client = [], [], [], 0
    for index, (place, record) in enumerate(objects):
        metrics = _profiled(record, place)
        if metrics is None:
            continue
        prompt = count(_metric(metrics, "input_sequence_length", place), "value", place, 1)
        output = count(_metric(metrics, "output_sequence_length", place), "value", place, 1)
        lengths.append((prompt, output))
        latencies.append(metrics)
        spec = record.get("spec_decode_acceptance")
        if spec is None:
            continue
        served = check_object(spec, place).get("completion_tokens")
        client += served is None
        found = spec_metrics(_dense(check_object(spec, place), place), place)
        if found is not None:
            tokens = output if served is None else count(spec, "completion_tokens", place, 1)
            name = f"{path.stem}/{index}"
            requests.append(
                Request(
                    place=place,
                    name=name,
                    domain=origin.domain_of(path),
                    prompt_tokens=prompt,
                    output_tokens=tokens,
                    finish_reason="unknown",
                    metrics=found,
                )
            )
    if not lengths:
        raise TraceError(f"{path}: holds no request that succeeded while profiling")
    unknown = []
    if requests and client:
        unknown.append(
            f"output tokens of {client} request(s) as the server counts them: AIPerf's own count is used, which a "
            "tokenizer of its own may have made"
        )
    return _Run(lengths, _latencies(latencies), tuple(unknown), tuple(requests))


def _profiled(record: Object, place: str) -> Object | None:
    """Give the metrics of a record; None for a request that failed, was cancelled or belongs to the warm-up."""
    metadata = check_object(record.get("metadata"), f"{place}: metadata")
    if record.get("error") is not None or metadata.get("was_cancelled"):
        return None
    if metadata.get("benchmark_phase", "profiling") != "profiling":
        return None
    return check_object(record.get("metrics"), f"{place}: metrics")


def _metric(metrics: Object, name: str, place: str) -> Object:
    found = metrics.get(name)
    if not isinstance(found, Mapping):
        raise TraceError(f"{place}: metrics.{name} must be there with a value and a unit, got {found!r}")
    return found


def _dense(spec: Object, place: str) -> dict[str, Any]:
    """Give the acceptance record with the histogram as vLLM writes it: a list by accepted tokens."""
    histogram = spec.get("acceptance_histogram")
    if histogram is None:
        return dict(spec)
    return {**spec, "acceptance_histogram": _histogram(histogram, f"{place}: acceptance_histogram")}


def _histogram(sparse: Any, place: str) -> list[int]:
    """Read ``{"0": 34, "2": 19}``: rounds by accepted tokens."""
    held = check_object(sparse, place)
    if not held or not all(str(key).isdigit() for key in held):
        raise TraceError(f"{place}: must map numbers of accepted tokens to rounds, got {dict(held)!r}")
    dense = [0] * (max(int(key) for key in held) + 1)
    for key in held:
        dense[int(key)] = count(held, key, place)
    return dense


def _latencies(metrics: Sequence[Object]) -> tuple[str, ...]:
    """Note the mean latencies of records; they have no place in a TraceSet."""
    lines = []
    for name in _LATENCIES:
        found = [one[name] for one in metrics if isinstance(one.get(name), Mapping)]
        values = [float(one["value"]) for one in found if isinstance(one.get("value"), int | float)]
        if values:
            unit = found[0].get("unit", "unit not stated")
            lines.append(f"measured there: mean {name} {np.mean(values):.3f} {unit} over {len(values)} requests")
    return tuple(lines)


def _summary(place: str, export: Object) -> _Run:
    """Read the statistics of a whole run."""
    sizes = [
        check_object(export.get(name), f"{place}: {name}")
        for name in ("input_sequence_length", "output_sequence_length")
    ]
    if "count" in sizes[1]:
        number = count(sizes[1], "count", f"{place}: output_sequence_length", 1)
    else:
        number = count(check_object(export.get("request_count"), f"{place}: request_count"), "avg", place, 1)
    means = [measure(one, "avg", place, 1) for one in sizes]
    notes = []
    for name in _LATENCIES:
        block = export.get(name)
        if isinstance(block, Mapping) and isinstance(block.get("avg"), int | float):
            notes.append(f"measured there: mean {name} {block['avg']:.3f} {block.get('unit', '')}".rstrip())
    return _Run(
        even_lengths(number, round(means[0] * number), round(means[1] * number), place),
        tuple(notes),
        ("lengths of single requests: the export holds their statistics; every request has the mean",),
        pooled=None if export.get(_POOLED) is None else _pooled(export, place),
    )


def _pooled(export: Object, place: str) -> SpecTotals:
    """Read the histogram of accepted tokens, pooled over the run."""
    histogram = np.array(_histogram(export[_POOLED], f"{place}: {_POOLED}"))
    positions = np.cumsum(histogram[::-1])[::-1][1:]
    drafts, accepted = float(histogram.sum()), float(positions.sum())
    drafted = export.get("total_draft_tokens")
    if isinstance(drafted, Mapping):
        tokens = measure(drafted, "avg", f"{place}: total_draft_tokens")
        length = max(len(positions), round(tokens / drafts)) if drafts else len(positions)
    else:
        tokens, length = drafts * len(positions), len(positions)
    padded = [*positions.tolist(), *[0.0] * (length - len(positions))]
    return SpecTotals(place, drafts, tokens, accepted, tuple(float(one) for one in padded))


def _server_totals(file: str | os.PathLike[str]) -> SpecTotals:
    """Read the increase of the server's counters."""
    place, export = _only(read_objects(file), Path(file))
    counters: dict[str, float] = {}
    for name, metric in check_object(export.get("metrics"), f"{place}: metrics").items():
        held = check_object(metric, f"{place}: metrics.{name}")
        if held.get("type") != "counter":
            continue
        for number, series in enumerate(held.get("series") or ()):
            where = f"{place}: metrics.{name}.series[{number}]"
            stats = check_object(check_object(series, where).get("stats"), f"{where}.stats")
            labels = {**(series.get("labels") or {}), "series": number}
            shown = ",".join(f'{label}="{labels[label]}"' for label in sorted(labels))
            counters[f"{name.removesuffix('_total')}_total{{{shown}}}"] = measure(stats, "total", where)
    return totals_of(counters, place)
