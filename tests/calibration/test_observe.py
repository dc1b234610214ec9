"""Observed runs against a local server that speaks the protocol at set delays."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from openai_server import OpenAIServer

from calibration.common.errors import CalibrationError, MissingExtraError
from calibration.measured import MeasuredRun
from calibration.observe.prompts import Prompt
from calibration.observe.run import Observation, observe
from simulator.playback.replay import SequenceTable
from simulator.scenario.loading import parse_scenario
from simulator.workload import make_source

ABOUT = Observation(name="local", role="fit", scenario='name = "local"\n', scenario_hash="0", command="tests")
TOLERANCE_S = 0.03


@pytest.fixture(autouse=True)
def _counts_settle_at_once(monkeypatch):
    """The local server counts before it ends an answer."""
    monkeypatch.setattr("calibration.observe.run._SETTLE_S", 0.0)


def table(output_tokens, prompt_tokens=5):
    """A table of sequences, one for each number of output tokens."""
    number = len(output_tokens)
    ids = tuple(f"sequence-{i}" for i in range(number))
    return SequenceTable(ids, ("chat",) * number, (prompt_tokens,) * number, tuple(output_tokens))


def workload(sequences, **keys):
    """A factory of the simulator's own sources."""
    data = {"name": "local", "traces": {"bundled": "smollm2-135m-cpu-greedy"}, "workload": keys, "seed": 3}
    scenario = parse_scenario(data)
    return lambda: make_source(scenario, sequences)


def prompts(sequences, *, text=False, ids=True):
    return [
        Prompt(name, "chat", tuple(range(100, 105)) if ids else None, f"a b c d {name}" if text else None)
        for name in sequences.ids
    ]


def run(server, output_tokens, *, text=False, ids=True, repeats=1, load=None, **options):
    """Observe `server` under one request after another, or under `load`."""
    sequences = table(output_tokens)
    factory = workload(sequences, **(load or {"kind": "closed", "concurrency": 1}))
    url = server.url if isinstance(server, OpenAIServer) else server
    return observe(url, factory, prompts(sequences, text=text, ids=ids), ABOUT, repeats=repeats, **options)


class Tolerance:
    """How far a time may be off: 30 ms, and more where the machine itself lets threads oversleep meanwhile."""

    def __enter__(self):
        self._ended, self._overslept = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._sleep, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *fault):
        self._ended.set()
        self._thread.join()
        self.seconds = TOLERANCE_S + 10 * self._overslept

    def _sleep(self):
        while not self._ended.is_set():
            began = time.monotonic()
            time.sleep(0.005)
            self._overslept = max(self._overslept, time.monotonic() - began - 0.005)


def quartile(values):
    """The lower quartile: delays of a busy machine only ever add to a time."""
    found = sorted(values)
    return found[len(found) // 4]


def rows(measured):
    return measured.requests.to_pylist()


def test_closed_loop_keeps_its_concurrency_and_never_more():
    with OpenAIServer() as server, Tolerance() as tolerance:
        measured = run(server, [6] * 8, load={"kind": "closed", "concurrency": 3}, repeats=2)
    assert server.most_at_once == 3
    assert len(server.measured) == 16
    assert [row["request_id"] for row in rows(measured)] == [*range(8)] * 2
    assert [row["repeat"] for row in rows(measured)] == [0] * 8 + [1] * 8
    # Who waits for an answer asks again when it has ended: request 3 arrives with the first end of requests 0 to 2.
    first = rows(measured)[:8]
    ends = sorted(row["finish_s"] for row in first)
    waited = [row["arrival_s"] - end for row, end in zip(first[3:], ends, strict=False)]
    assert min(waited) >= 0
    assert quartile(waited) < tolerance.seconds
    assert measured.steps.num_rows == 0
    assert measured.manifest.clock == "wall"
    assert measured.manifest.repeats == 2


def test_fillers_keep_a_batch_full_and_are_dropped_at_the_end():
    with OpenAIServer() as server:
        load = {"kind": "closed", "concurrency": 2, "requests": 3, "keep_full": True}
        measured = run(server, [3, 30, 3], load=load)
    counted = [row["request_id"] for row in rows(measured) if row["counted"]]
    assert counted == [0, 1, 2]
    assert len(server.measured) > len(rows(measured)) >= 3


def test_poisson_arrivals_go_out_at_their_times():
    sequences = table([5] * 12)
    factory = workload(sequences, kind="poisson", rate_rps=25.0, requests=12)
    wanted = []
    source = factory()
    while len(wanted) < 12:
        wanted.append(source.next_arrival_s)
        source.admit(source.next_arrival_s, 1)
    with OpenAIServer(first_s=0.15) as server, Tolerance() as tolerance:
        measured = observe(server.url, factory, prompts(sequences), ABOUT)
    assert [row["arrival_s"] for row in rows(measured)] == pytest.approx(wanted, abs=1e-12)
    arrived = [one.arrived for one in server.measured]
    late = [(a - arrived[0]) - (w - wanted[0]) for a, w in zip(arrived, wanted, strict=True)]
    assert len(arrived) == 12
    assert quartile(map(abs, late[1:])) < tolerance.seconds
    assert server.most_at_once > 1, "an open loop does not wait for answers"
    assert any("went out at most" in note for note in measured.manifest.notes)


def test_times_are_those_at_which_the_server_sent():
    with OpenAIServer(first_s=0.05, step_s=0.02) as server, Tolerance() as tolerance:
        measured = run(server, [6, 6, 6])
    for row, seen in zip(rows(measured), server.measured, strict=True):
        assert len(row["emission_s"]) == len(seen.sent) == 6
        assert row["first_token_s"] == row["emission_s"][0] >= row["arrival_s"] + 0.05
        assert row["finish_s"] == row["emission_s"][-1]
        theirs = [b - a for a, b in zip(seen.sent, seen.sent[1:], strict=False)]
        mine = [b - a for a, b in zip(row["emission_s"], row["emission_s"][1:], strict=False)]
        assert quartile(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < tolerance.seconds
    first = [row["first_token_s"] - row["arrival_s"] for row in rows(measured)]
    theirs = [seen.sent[0] - seen.arrived for seen in server.measured]
    assert 0 <= min(a - b for a, b in zip(first, theirs, strict=True)) < tolerance.seconds


def test_several_tokens_a_chunk_and_speculation_of_vllm():
    with OpenAIServer(per_step=(4, 1, 2), level="detailed") as server:
        measured = run(server, [10, 4], repeats=2)
    # 10 = 1 + 4 + 1 + 2 + 2 of 4: four drafts of 3, of which 3 + 0 + 1 + 3 are accepted. 4 = 1 + 3 of 4.
    assert [row["emitted"] for row in rows(measured)] == [[1, 4, 1, 2, 2], [1, 3]] * 2
    assert [row["output_tokens"] for row in rows(measured)] == [10, 4] * 2
    assert [row["drafts"] for row in rows(measured)] == [4, 1] * 2
    assert [row["drafted_tokens"] for row in rows(measured)] == [12, 3] * 2
    assert [row["accepted_tokens"] for row in rows(measured)] == [7, 3] * 2
    assert [row["output_token_ids"] for row in rows(measured)] == [[7] * 10, [7] * 4] * 2
    label = 'engine="0",model_name="tiny"'
    assert measured.manifest.counters == {
        f"vllm:generation_tokens_total{{{label}}}": 28.0,
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="0"}}': 8.0,
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="1"}}': 6.0,
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="2"}}': 6.0,
        f"vllm:spec_decode_num_accepted_tokens_total{{{label}}}": 20.0,
        f"vllm:spec_decode_num_draft_tokens_total{{{label}}}": 30.0,
        f"vllm:spec_decode_num_drafts_total{{{label}}}": 10.0,
    }
    assert measured.manifest.engine.name == "vllm"
    assert measured.manifest.engine.version == "0.32.0"
    assert measured.manifest.unknown == (
        "steps: a server shows what requests receive, not its iterations",
        "device: not given",
    )


def test_speculation_at_the_level_summary_says_the_same():
    with OpenAIServer(per_step=(4, 1, 2), level="summary") as server:
        (row,) = rows(run(server, [10]))
    assert (row["drafts"], row["drafted_tokens"], row["accepted_tokens"]) == (4, 12, 7)


def test_requests_ask_for_greedy_text_of_a_given_length_and_for_all_that_the_server_tells():
    with OpenAIServer(api_key="secret") as server:
        run(server, [6, 5], repeats=2, api_key="secret")
    bodies = [one.body for one in server.measured]
    salts = [body.pop("cache_salt") for body in bodies]
    assert salts[0] == salts[1] != salts[2] == salts[3], "every repeat has a prefix cache of its own"
    assert bodies[0] == {
        "model": "tiny",
        "prompt": [100, 101, 102, 103, 104],
        "max_tokens": 6,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
        "return_token_ids": True,
    }
    assert [body["max_tokens"] for body in bodies] == [6, 5, 6, 5]
    assert server.measured[0].headers["Authorization"] == "Bearer secret"


def test_sglang_reports_rounds_and_its_settings():
    with OpenAIServer(style="sglang", per_step=(4, 1, 2), level="summary", metrics=False) as server:
        measured = run(server, [10])
    (row,) = rows(measured)
    assert (row["drafts"], row["drafted_tokens"], row["accepted_tokens"]) == (4, 12, 7)
    assert row["emitted"] == [1, 4, 1, 2, 2], "from the running usage"
    assert row["output_token_ids"] is None
    assert measured.manifest.engine.settings == {"speculative_num_steps": 3, "endpoint": "completions"}
    assert "counters: the server has no /metrics" in measured.manifest.unknown
    assert measured.manifest.counters == {}


def test_llama_cpp_reports_drafted_and_accepted_but_no_rounds():
    with OpenAIServer(style="llama.cpp", per_step=(4, 1, 2), level="summary") as server:
        measured = run(server, [10])
    (row,) = rows(measured)
    assert (row["drafts"], row["drafted_tokens"], row["accepted_tokens"]) == (None, 12, 7)
    assert measured.manifest.engine.name == "llama.cpp"
    assert measured.manifest.engine.version == "b8681"
    assert row["emitted"] is None, "five arrivals of ten tokens, of unknown sizes"
    assert any(text.startswith("emitted:") for text in measured.manifest.unknown)


def test_a_server_that_takes_text_and_no_other_fields_alone():
    with OpenAIServer(style="transformers", models=("cached",)) as server:
        measured = run(server, [6, 6], text=True, model="a-folder")
    assert [row["output_tokens"] for row in rows(measured)] == [6, 6]
    assert [row["emitted"] for row in rows(measured)] == [[1] * 6] * 2, "as many arrivals as tokens"
    assert server.measured[0].body["prompt"] == "a b c d sequence-0"
    assert measured.manifest.engine.name == "transformers"
    assert "prompts were sent as text" in measured.manifest.notes[0]
    assert "stream_options" in measured.manifest.notes[0]


def test_a_server_that_counts_nothing():
    with OpenAIServer(style="plain", usage=False, per_step=(2,), metrics=False) as server:
        measured = run(server, [7])
    (row,) = rows(measured)
    assert row["output_tokens"] == 4, "one arrival is taken for one token"
    assert any(text.startswith("output_tokens:") for text in measured.manifest.unknown)
    assert any(text.startswith("prompt_tokens:") for text in measured.manifest.unknown)
    assert any(text.startswith("engine:") for text in measured.manifest.unknown)
    assert "1 of 1 requests got fewer tokens than asked for" in measured.manifest.notes


def test_chat_sends_text_as_a_message():
    with OpenAIServer() as server:
        (row,) = rows(run(server, [6], text=True, endpoint="chat"))
        assert server.measured[0].body["messages"] == [{"role": "user", "content": "a b c d sequence-0"}]
        assert row["emitted"] == [1] * 6, "the first chunk names the role and holds no token"
        with pytest.raises(CalibrationError, match="a chat must have its prompts as text"):
            run(server, [6], endpoint="chat")


def test_what_differs_from_the_workload_is_noted():
    with OpenAIServer(answers=4, cached_tokens=3) as server:
        sequences = table([6, 3], prompt_tokens=7)
        factory = workload(sequences, kind="closed", concurrency=1)
        measured = observe(server.url, factory, prompts(sequences), ABOUT)
    assert [row["output_tokens"] for row in rows(measured)] == [4, 3]
    assert server.measured[0].body["prompt"] == [103, 104, 100, 101, 102, 103, 104]
    notes = measured.manifest.notes
    assert "1 of 2 requests got fewer tokens than asked for" in notes
    assert "2 of 2 requests had a prompt that was cut or repeated to the workload's length" in notes
    assert "2 of 2 requests had prompt tokens in the server's prefix cache" in notes


def test_what_others_have_from_the_server_is_noted():
    with OpenAIServer() as server:
        sequences = table([6])

        def progress(done, total):
            server.counters["generation_tokens"] += 1000

        factory = workload(sequences, kind="closed", concurrency=1)
        measured = observe(server.url, factory, prompts(sequences), ABOUT, progress=progress)
    told = "the server counted 1006 generation_tokens_total, the requests recorded here add up to 6"
    assert told in measured.manifest.notes


def test_progress_hears_of_every_counted_request():
    heard = []
    with OpenAIServer(first_s=0.0) as server:
        run(server, [3, 3], repeats=2, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_it_is_read_again_as_it_was_written(tmp_path):
    with OpenAIServer(per_step=(2,), level="detailed") as server:
        measured = run(server, [6])
    measured.write(tmp_path / "run")
    again = MeasuredRun.read(tmp_path / "run")
    assert again.manifest == measured.manifest
    assert again.requests == measured.requests
    assert again.scenario == ABOUT.scenario


def test_nobody_listens():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(CalibrationError, match=rf"{url}/v1/models: cannot connect.*is the server running\?"):
            run(url, [6])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("http", r"/v1/completions: the server must answer with HTTP 200, got 500: out of memory$"),
        ("breaks", r"/v1/completions: the connection broke, .*; request \d had 2 of 6 tokens$"),
        ("ends", r"/v1/completions: the stream must end with a finish_reason, it broke off; request \d had 2 of 6"),
        ("event", r"/v1/completions: the server broke off, engine died; request \d had 2 of 6 tokens$"),
        ("page", r"/v1/completions: stream: must be server-sent events, got the line '<html>sorry</html>'"),
        ("hangs", r"/v1/completions: the next byte of an answer must come within 1 s, none came; request \d had 2"),
    ],
)
def test_faults_of_a_stream_are_one_error_each(fault, message):
    wait_s = 1.0 if fault == "hangs" else 300.0
    with OpenAIServer(fault=fault) as server, pytest.raises(CalibrationError, match=message) as caught:
        run(server, [6, 6, 6], load={"kind": "closed", "concurrency": 3}, timeout_s=wait_s)
    assert str(caught.value).startswith(server.url)


def test_models_are_chosen_by_name():
    with OpenAIServer(models=("llama-8b", "llama-70b")) as server:
        with pytest.raises(CalibrationError, match=r"lists just one, it lists llama-8b, llama-70b$"):
            run(server, [6])
        with pytest.raises(CalibrationError, match=r"got 'lama-8b'; did you mean 'llama-8b'\?$"):
            run(server, [6], model="lama-8b")
        assert run(server, [6], model="llama-70b").manifest.model == "llama-70b"


def test_a_server_that_wants_a_key_says_so():
    with OpenAIServer(api_key="secret") as server, pytest.raises(CalibrationError, match=r"got 401: invalid key$"):
        run(server, [6], api_key="other")


def test_a_request_that_the_server_refuses_is_told_in_its_words():
    with (
        OpenAIServer() as server,
        pytest.raises(CalibrationError, match=r"got 400: max_tokens must be at most 1000$"),
    ):
        run(server, [2000])


def test_an_address_that_is_none():
    with pytest.raises(CalibrationError, match="url: must begin with http:// or https://, got 'localhost:8000'"):
        run("localhost:8000", [6])


def test_v1_at_the_end_of_the_address_is_the_same_server():
    with OpenAIServer() as server:
        assert len(rows(run(f"{server.url}/v1/", [6]))) == 1


def test_a_page_that_is_no_such_server():
    with OpenAIServer() as server:
        server.behaviour.models = ()
        with pytest.raises(CalibrationError, match=r"it lists none$"):
            run(server, [6])


def test_without_httpx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'paceline\[observe\]'"):
        run("http://127.0.0.1:1", [6])


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
from calibration.observe.prompts import Prompt
from calibration.observe.run import Observation, observe
from test_observe import ABOUT, prompts, table, workload
sequences = table([9, 900])
factory = workload(sequences, kind="closed", concurrency=1)
def interrupt(done, total):
    assert done < total, "there must be something left to do"
    os.kill(os.getpid(), signal.SIGINT)

observe(sys.argv[1], factory, prompts(sequences), ABOUT, progress=interrupt).write(sys.argv[2])
"""
"""Ctrl-C when the first request has been counted."""


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    with OpenAIServer() as server:
        command = [sys.executable, "-c", INTERRUPTED, server.url, str(tmp_path / "run")]
        environment = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert server.measured, done.stderr
        assert done.returncode != 0
        assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert list(tmp_path.iterdir()) == []


def test_importing_it_brings_neither_httpx_nor_torch():
    code = (
        "import sys, calibration.observe.run; assert not {'httpx', 'torch', 'prometheus_client'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
