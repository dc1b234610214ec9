"""Observed runs of real servers with the real verifier, where their packages are installed.

A server is looked for beside this interpreter and on the PATH; ``PACELINE_SERVERS`` names folders to look in first.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from calibration.common.fetch import PUBLISHED, fetch
from calibration.observe.prometheus import by_position, total
from calibration.observe.prompts import recorded_prompts, with_text
from calibration.observe.run import Observation, observe
from calibration.traces import bundled
from simulator.playback.replay import SequenceTable
from simulator.scenario.loading import parse_scenario
from simulator.workload import make_source

pytestmark = pytest.mark.model

TRACES = "smollm2-135m-cpu-greedy"
TOKENS = 24
DRAFTED = 3
LOOKUP = f'{{"method":"ngram","num_speculative_tokens":{DRAFTED},"prompt_lookup_min":1,"prompt_lookup_max":3}}'
VLLM = [
    *("--max-model-len", "512", "--max-num-seqs", "4", "--dtype", "bfloat16", "--enforce-eager"),
    *("--speculative-config", LOOKUP, "--per-request-spec-decode-metrics", "detailed"),
]
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def program(name):
    """Path of a server's program; skips the test where there is none that can serve."""
    named = os.environ.get("PACELINE_SERVERS", "").split(os.pathsep)
    places = [*filter(None, named), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"no program '{name}' is installed")
    if name == "transformers":
        python = str(Path(found).parent / "python")
        check = subprocess.run([python, "-c", "import fastapi, openai, uvicorn"], capture_output=True, check=False)
        if check.returncode:
            pytest.skip("'transformers serve' lacks its packages: pip install 'transformers[serving]'")
    return found


def verifier():
    """Folder of the real verifier, downloaded on the first use ever."""
    return fetch(PUBLISHED["smollm2-135m"])


@pytest.fixture
def serve(tmp_path):
    """Starts a server, waits until it is ready, and ends it with all its processes."""
    started = []

    def start(command, port, ready):
        log = (tmp_path / "log").open("w")
        process = subprocess.Popen(
            command, env={**os.environ, **QUIET}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        started.append((process, log))
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            else:
                return f"http://127.0.0.1:{port}"
        pytest.fail((tmp_path / "log").read_text()[-3000:])

    yield start
    for process, log in started:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def measure(url, *, tokenizer=None, repeats=1, **options):
    """Four requests of two clients with recorded prompts, as text where there is a tokenizer."""
    traces = bundled(TRACES)
    chosen = traces.sequences.slice(0, 4).to_pydict()
    table = SequenceTable(
        tuple(chosen["sequence_id"]), tuple(chosen["domain"]), tuple(chosen["prompt_tokens"]), (TOKENS,) * 4
    )
    data = {"name": "real", "traces": {"bundled": TRACES}, "workload": {"kind": "closed", "concurrency": 2}}
    scenario = parse_scenario(data)
    prompts = with_text(recorded_prompts(traces, table.ids), tokenizer)
    about = Observation("real", "fit", scenario.to_toml(), scenario.hash, "tests")
    return observe(url, lambda: make_source(scenario, table), prompts, about, repeats=repeats, **options)


def check_times(rows):
    for row in rows:
        assert row["output_tokens"] == TOKENS
        assert row["emission_s"] == sorted(row["emission_s"])
        assert row["arrival_s"] < row["first_token_s"] <= row["finish_s"]
    ends = sorted(row["finish_s"] for row in rows)
    assert all(row["arrival_s"] >= end for row, end in zip(rows[2:], ends, strict=False)), "two at once, never three"


def test_vllm_with_prompt_lookup(serve):
    vllm, model, port = program("vllm"), verifier(), free_port()
    command = [vllm, "serve", str(model), "--served-model-name", "smollm2", "--port", str(port), *VLLM]
    measured = measure(serve([*command, "--host", "127.0.0.1"], port, "/health"), repeats=2)
    rows, manifest = measured.requests.to_pylist(), measured.manifest
    assert (manifest.engine.name, manifest.model) == ("vllm", "smollm2")
    assert manifest.engine.version
    for repeat in (0, 1):
        check_times([row for row in rows if row["repeat"] == repeat])
    for row in rows:
        assert sum(row["emitted"]) == len(row["output_token_ids"]) == TOKENS
        assert 0 < row["drafts"] <= len(row["emitted"])
        assert row["accepted_tokens"] <= row["drafted_tokens"] <= DRAFTED * row["drafts"]
        # Every round emits what it accepts and one bonus token; the last may be cut at the length asked for.
        beyond = sum(number - 1 for number in row["emitted"])
        assert beyond <= row["accepted_tokens"] <= beyond + DRAFTED
    counters = manifest.counters
    for name, column in (("drafts", "drafts"), ("draft_tokens", "drafted_tokens"), ("accepted_tokens",) * 2):
        assert total(counters, f"vllm:spec_decode_num_{name}_total") == sum(row[column] for row in rows)
    positions = by_position(counters, "vllm:spec_decode_num_accepted_tokens_per_pos_total")
    assert sum(positions) == sum(row["accepted_tokens"] for row in rows)
    assert positions == sorted(positions, reverse=True)
    assert total(counters, "vllm:generation_tokens_total") == len(rows) * TOKENS


def test_transformers_serve(serve):
    transformers, model, port = program("transformers"), verifier(), free_port()
    command = [transformers, "serve", str(model), "--device", "cpu", "--port", str(port)]
    url = serve([*command, "--host", "127.0.0.1"], port, "/health")
    measured = measure(url, tokenizer=model, model=str(model))
    check_times(measured.requests.to_pylist())
    assert measured.manifest.engine.name == "transformers"
    assert measured.manifest.model == model.name
    assert "prompts were sent as text" in measured.manifest.notes[0]
