"""Import of AIPerf exports: records with acceptance, records without, statistics of a run, server metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported import acceptance, near, walk

from calibration.common.errors import TraceError
from calibration.importers.aiperf import import_aiperf
from calibration.importers.origin import Origin

MODEL = Origin(drafter="small", paradigm="draft_model", temperature=0.0)


def record(prompt: int = 550, output: int = 9, spec: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """A record as docs/tutorials/working-with-profile-exports.md of ai-dynamo/aiperf shows it."""
    whole: dict[str, Any] = {
        "metadata": {
            "session_num": 45,
            "x_request_id": "7609a2e7-aa53-4ab1-98f4-f35ecafefd25",
            "turn_index": 0,
            "request_start_ns": 1759813207532900363,
            "benchmark_phase": "profiling",
            "was_cancelled": False,
            **metadata,
        },
        "metrics": {
            "input_sequence_length": {"value": prompt, "unit": "tokens"},
            "output_sequence_length": {"value": output, "unit": "tokens"},
            "time_to_first_token": {"value": 255.0 + output, "unit": "ms"},
            "inter_token_latency": {"value": 5.2, "unit": "ms"},
            "inter_chunk_latency": {"value": [4.9, 5.3], "unit": "ms"},
        },
        "error": None,
    }
    return whole if spec is None else {**whole, "spec_decode_acceptance": spec}


def spec(accepted: list[int], longest: int = 5, detailed: bool = True, tokens: int | None = None) -> dict[str, Any]:
    """An acceptance record as docs/reference/spec-decode-acceptance.md has it: the histogram is sparse."""
    found: dict[str, Any] = {
        "engine": "vllm",
        "mean_acceptance_length": 1 + sum(accepted) / len(accepted),
        "draft_acceptance_rate": sum(accepted) / (longest * len(accepted)),
        "acceptance_histogram": {str(j): accepted.count(j) for j in sorted(set(accepted))},
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": longest * len(accepted),
        "num_spec_steps": len(accepted),
        "num_spec_tokens": longest,
        "completion_tokens": tokens,
    }
    if detailed:
        found |= {"per_step_accepted": accepted, "per_step_drafted": [longest] * len(accepted)}
    return found


def write(folder: Path, *objects: Any, name: str = "profile_export.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(one) for one in objects) + "\n", encoding="utf-8")
    return path


def test_records_with_rounds_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        record(output=12, spec=spec([2, 0, 5], tokens=11)),
        record(prompt=30, output=8, spec=spec([1, 4])),
        record(spec=spec([3, 3]), benchmark_phase="warmup"),
        {**record(spec=spec([3])), "error": {"code": 499, "type": "RequestCancellationError"}, "metrics": {}},
    )
    traces = import_aiperf(path, origin=MODEL)
    assert traces.sequences["prompt_tokens"].to_pylist() == [550, 30]
    assert traces.sequences["output_tokens"].to_pylist() == [11, 8]  # the server's count, else AIPerf's own
    rounds = walk(traces, 5)
    assert [one.accepted for one in rounds if one.sequence.endswith("/0")] == [2, 0, 5]
    assert [one.accepted for one in rounds if one.sequence.endswith("/1")] == [1, 4]
    manifest = traces.manifest
    assert manifest.notes[0] == "measured there: mean time_to_first_token 265.000 ms over 2 requests"
    assert manifest.notes[-1] == "profile_export.jsonl: 2 object(s) without rounds left out"
    assert any("output tokens of 1 request(s) as the server counts them" in item for item in manifest.unknown)


def test_records_with_histograms(tmp_path: Path) -> None:
    # The documentation's own worked example: {0: 34, 1: 22, 2: 19, 3: 16, 4: 15, 5: 22}, 128 steps of 5.
    held = {0: 34, 1: 22, 2: 19, 3: 16, 4: 15, 5: 22}
    accepted = [j for j, number in held.items() for _ in range(number)]
    path = write(tmp_path, record(output=128 + sum(accepted) + 1, spec=spec(accepted, detailed=False)))
    traces = import_aiperf(path, origin=MODEL)
    assert sorted(one.accepted for one in walk(traces, 5)) == sorted(accepted)
    assert any("order of rounds in 1 request(s)" in item for item in traces.manifest.unknown)


def test_lengths_alone_need_rates(tmp_path: Path) -> None:
    sizes = [(100 + i, 150 + i) for i in range(60)]
    path = write(tmp_path, *(record(prompt, output) for prompt, output in sizes))
    with pytest.raises(TraceError, match=r"holds no acceptance .* give server_metrics .* or rates"):
        import_aiperf(path)
    traces = import_aiperf(path, rates=[0.8, 0.6, 0.5], origin=MODEL)
    lengths = zip(*(traces.sequences[name].to_pylist() for name in ("prompt_tokens", "output_tokens")), strict=True)
    assert list(lengths) == sizes
    rates, number = acceptance(walk(traces, 3), 3)
    assert near(rates, [0.8, 0.6, 0.5], number)
    assert "acceptance: not in the export; GIVEN BY THE USER" in traces.manifest.unknown
    assert traces.manifest.notes[0].startswith("MADE UP FROM AGGREGATES")


def counter(total: float, **labels: str) -> dict[str, Any]:
    return {"endpoint_url": "http://localhost:8000/metrics", "labels": labels, "stats": {"total": total, "rate": 1.0}}


def server(suffix: str = "") -> dict[str, Any]:
    """What docs/server-metrics/server-metrics-json-schema.md describes, for two engines."""
    positions = [
        counter(total / 2, engine=engine, position=str(at)) for at, total in enumerate((800, 500)) for engine in "01"
    ]
    found: dict[str, list[dict[str, Any]]] = {
        "vllm:spec_decode_num_drafts": [counter(500, engine="0"), counter(500, engine="1")],
        "vllm:spec_decode_num_draft_tokens": [counter(2000, engine="0")],
        "vllm:spec_decode_num_accepted_tokens": [counter(1300, engine="0")],
        "vllm:spec_decode_num_accepted_tokens_per_pos": positions,
    }
    metrics: dict[str, Any] = {
        name + suffix: {"type": "counter", "description": "", "series": series} for name, series in found.items()
    }
    metrics["vllm:num_requests_running"] = {"type": "gauge", "series": [{"stats": {"avg": 3.0}}]}
    return {"schema_version": "1.0", "summary": {}, "metrics": metrics}


@pytest.mark.parametrize("suffix", ["", "_total"])
def test_acceptance_from_server_metrics(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, *(record(50, 200) for _ in range(40)))
    scraped = write(tmp_path, server(suffix), name="server_metrics_export.json")
    traces = import_aiperf(path, server_metrics=scraped, origin=MODEL)
    rates, number = acceptance(walk(traces, 2), 2)
    assert near(rates, [0.8, 0.5], number)
    assert "counted over 1000 drafts" in traces.manifest.notes[1]
    # 8,000 output tokens, of which 40 from prefill, 1,000 from rounds with a draft and 1,300 accepted.
    assert traces.manifest.notes[2] == "84.98% of rounds had no draft, by the engine's choice: left out"
    assert "mean inter_token_latency 5.200 ms over 40 requests" in traces.manifest.notes[4]


def summary(**more: Any) -> dict[str, Any]:
    """profile_export_aiperf.json as docs/reference/json-export-schema.md describes it."""
    return {
        "schema_version": "1.5",
        "input_sequence_length": {"unit": "tokens", "avg": 512.5, "count": 40},
        "output_sequence_length": {"unit": "tokens", "avg": 250.25, "count": 40},
        "inter_token_latency": {"unit": "ms", "avg": 7.25},
        "request_count": {"unit": "requests", "avg": 40.0},
        **more,
    }


def test_statistics_of_a_run(tmp_path: Path) -> None:
    held = {"0": 640, "1": 460, "2": 384, "3": 332, "5": 435}
    path = write(tmp_path, summary(pooled_spec_decode_acceptance_histogram=held), name="profile_export_aiperf.json")
    traces = import_aiperf(path, origin=MODEL)
    assert sum(traces.sequences["prompt_tokens"].to_pylist()) == 20500
    assert sum(traces.sequences["output_tokens"].to_pylist()) == 10010
    steps = sum(held.values())
    wanted = [sum(number for j, number in held.items() if int(j) >= at) / steps for at in range(1, 6)]
    rates, number = acceptance(walk(traces, 5), 5)
    assert near(rates, wanted, number)
    assert any("every request has the mean" in item for item in traces.manifest.unknown)
    # Drafts longer than anything that was accepted are told by their sum.
    path = write(
        tmp_path,
        summary(pooled_spec_decode_acceptance_histogram=held, total_draft_tokens={"avg": 7.0 * steps}),
        name="profile_export_aiperf.json",
    )
    assert import_aiperf(path, origin=MODEL).manifest.drafters[0].max_draft_tokens == 7


def test_statistics_without_acceptance(tmp_path: Path) -> None:
    older = summary()
    del older["output_sequence_length"]["count"]
    path = write(tmp_path, older, name="profile_export_aiperf.json")
    traces = import_aiperf(path, rates=[0.5], origin=MODEL)
    assert traces.sequences.num_rows == 40
    assert "measured there: mean inter_token_latency 7.250 ms" in traces.manifest.notes


def test_rates_of_a_lookup_need_its_rounds_without_a_draft(tmp_path: Path) -> None:
    path = write(tmp_path, *(record(50, 400) for _ in range(50)))
    ngram = Origin(paradigm="ngram")
    for origin in (ngram, Origin()):
        with pytest.raises(TraceError, match=r"rates: .* --paradigm eagle3 .* --undrafted SHARE"):
            import_aiperf(path, rates=[0.8, 0.6], origin=origin)
    traces = import_aiperf(path, rates=[0.8, 0.6], undrafted=0.7, origin=ngram)
    rounds = [one for one in walk(traces, 2) if one.whole]
    assert near(np.mean([one.drafted == 0 for one in rounds]), 0.7, len(rounds))
    assert "70.00% of rounds had no draft: 1.42 tokens per round over all" in traces.manifest.notes[1]  # 1 + .3 * 1.4
    with pytest.raises(TraceError, match="undrafted: must be 0 for a drafter that always proposes"):
        import_aiperf(path, rates=[0.8, 0.6], undrafted=0.7, origin=MODEL)
    with pytest.raises(TraceError, match="undrafted must be given with rates alone"):
        import_aiperf(path, undrafted=0.7, origin=ngram)


def test_exports_of_two_runs_are_not_taken_for_one(tmp_path: Path) -> None:
    path = write(tmp_path, summary(), summary())
    with pytest.raises(TraceError, match="must hold one run, got 2"):
        import_aiperf(path, rates=[0.8], origin=MODEL)
    lone, twice = write(tmp_path, record()), write(tmp_path, server(), server(), name="server.json")
    with pytest.raises(TraceError, match=r"server.json: must hold one run, got 2"):
        import_aiperf(lone, server_metrics=twice, origin=MODEL)


def test_a_spread_is_for_aggregates(tmp_path: Path) -> None:
    path = write(tmp_path, *(record(50, 400) for _ in range(50)))
    traces = import_aiperf(path, rates=[0.8, 0.6, 0.5], request_std_tokens=0.5, origin=MODEL)
    rounds = walk(traces, 3)
    means = [np.mean([r.accepted for r in rounds if r.sequence == name]) for name in {r.sequence for r in rounds}]
    assert 0.45 < np.std(means) < 0.6
    with pytest.raises(TraceError, match="holds acceptance per request, so request_std_tokens must not"):
        import_aiperf(write(tmp_path, record(spec=spec([1, 2]))), request_std_tokens=0.5)


def test_faults(tmp_path: Path) -> None:
    good = record(spec=spec([1, 2]))
    path = write(tmp_path, good)
    with pytest.raises(TraceError, match="holds acceptance itself, so rates must not be given"):
        import_aiperf(path, rates=[0.5])
    with pytest.raises(TraceError, match="must be given rates or server_metrics, got both"):
        import_aiperf(path, rates=[0.5], server_metrics=path)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**good, "metadata": 3}, "metadata: must be a JSON object, got int"),
        ({**good, "metrics": None}, "metrics: must be a JSON object, got NoneType"),
        ({**good, "metrics": {}}, "metrics.input_sequence_length must be there with a value and a unit, got None"),
        (record(output=0), "value: must be a whole number >= 1, got 0"),
        (record(spec={**spec([1]), "acceptance_histogram": {"x": 1}}), "acceptance_histogram: must map numbers"),
        (record(spec={**spec([1]), "num_spec_steps": 2}), "per_step_drafted must have one entry per step (2), got 1"),
    ]
    for bad, message in wrong:
        path = write(tmp_path, good, bad)
        with pytest.raises(TraceError, match=re.escape(message)) as caught:
            import_aiperf(path)
        assert str(caught.value).startswith(f"{path}:2: ")
    path = write(tmp_path, record(benchmark_phase="warmup"))
    with pytest.raises(TraceError, match="holds no request that succeeded"):
        import_aiperf(path)
    path = write(tmp_path, {"schema_version": "1.5"})
    with pytest.raises(TraceError, match="input_sequence_length: must be a JSON object"):
        import_aiperf(path)
    lone = write(tmp_path, record(), name="lone.jsonl")
    silent = write(tmp_path, {"metrics": {"a": {"type": "counter", "series": [counter(1)]}}}, name="server.json")
    with pytest.raises(TraceError, match="spec_decode_num_drafts_total must be there"):
        import_aiperf(lone, server_metrics=silent)
    empty = write(tmp_path, {"metrics": {"a": {"type": "counter", "series": [{"stats": {}}]}}}, name="server.json")
    with pytest.raises(TraceError, match=r"metrics.a.series\[0\]: total: must be a number >= 0, got None"):
        import_aiperf(lone, server_metrics=empty)
