"""A day of traffic through a fleet: what a whole process costs, and its memory. Run with --benchmark-enable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shared_data import shared_data

from calibration.importers import import_specdecode_bench

ROOT = Path(__file__).resolve().parents[2]
H100 = {
    "overhead_s": 1.207e-3,
    "verifier": {"kind": "linear", "base_s": 5.886e-3, "per_token_s": 21e-6, "per_context_token_s": 0.0393e-6},
    "drafter": {
        "kind": "linear",
        "base_s": 2.135e-3,
        "per_token_s": 0.84e-6,
        "per_context_token_s": 0.0024e-6,
        "charged": "per_round",
    },
}
CODE = r"""
import json, pathlib, re, sys, time
from simulator import parse_scenario, simulate
summary = simulate(parse_scenario(json.loads(sys.argv[1]))).summary
numbers = {name: value for name, value in summary.items() if isinstance(value, int | float)}
status = pathlib.Path("/proc/self/status")  # not getrusage: its peak counts the parent before exec
if status.exists():
    numbers["peak_mb"] = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
json.dump({"cpu_s": time.process_time(), **numbers}, sys.stdout)
"""


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EAGLE on Llama-3.1-8B: three data sets, 1,110 recorded requests."""
    folder = shared_data("specdecode-bench-simulator", "data", "llama3.1-8B")
    files = sorted(folder.glob("combined_*.jsonl"))
    return import_specdecode_bench(files).write(tmp_path_factory.mktemp("traces") / "eagle")


def fleet(traces: Path, workload: dict[str, Any], **engine: Any) -> dict[str, Any]:
    """Four replicas with EAGLE, three tokens drafted."""
    return {
        "traces": {"path": str(traces)},
        "drafter": {"name": "eagle"},
        "stopping": {"policy": "fixed", "draft_tokens": 3},
        "engine": {"max_num_seqs": 256, **engine},
        "workload": workload,
        "replica": [{"name": "h100", "count": 4}],
        "routing": {"replica": {"policy": "least_loaded"}},
        "costs": H100,
    }


def whole_process(plan: dict[str, Any]) -> dict[str, float]:
    """Run `plan` in a process of its own, imports and reading of traces included."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, json.dumps(plan)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    numbers: dict[str, float] = json.loads(done.stdout)
    return numbers


def azure(**settings: Any) -> dict[str, Any]:
    path = shared_data("azure-llm-2023", "AzureLLMInferenceTrace_conv.csv")
    return {"kind": "trace", "format": "azure", "path": str(path), **settings}


@pytest.mark.parametrize("multiplier", [8.0, 12.0, 14.0])
def test_azure_chat_through_four_replicas(benchmark: Any, traces: Path, multiplier: float) -> None:
    """19,366 requests with 4.1 M output tokens; 14 times the recorded rate is just below saturation."""
    requests = None if benchmark.enabled else 500
    plan = fleet(traces, azure(rate_multiplier=multiplier, **({"requests": requests} if requests else {})))
    numbers = benchmark.pedantic(whole_process, (plan,), rounds=3 if benchmark.enabled else 1)
    assert numbers["completed"] == (requests or 19366)
    if requests is None:
        assert numbers["total_output_tokens"] == 4_088_665
    for name in ("cpu_s", "peak_mb", "iterations", "mean_ttft_ms", "idle_s"):
        benchmark.extra_info[name] = numbers.get(name)
    benchmark.extra_info["tokens per CPU second"] = numbers["total_output_tokens"] / numbers["cpu_s"]


@pytest.mark.parametrize("requests", [2_000, 20_000, 60_000])
def test_memory_against_requests(benchmark: Any, traces: Path, requests: int) -> None:
    """A row of 160 bytes a request, one of 140 an iteration, and 8 bytes an emission for percentiles."""
    requests = requests if benchmark.enabled else requests // 100
    plan = fleet(traces, {"kind": "poisson", "rate_rps": 60.0, "requests": requests})
    numbers = benchmark.pedantic(whole_process, (plan,), rounds=1)
    assert numbers["completed"] == requests
    benchmark.extra_info["peak_mb"] = numbers.get("peak_mb")
    benchmark.extra_info["iterations"] = numbers["iterations"]
