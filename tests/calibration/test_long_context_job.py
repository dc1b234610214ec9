"""The table [long_context] of a job file: what it says is measured, beside the TraceSet, and only once."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from tiny import VOCABULARY, save_tiny, tiny_verifier

import calibration.jobs.job
import paceline
from calibration.common.errors import CalibrationError
from calibration.drafters import EarlyExit
from calibration.jobs.job import calibrate
from calibration.jobs.jobfile import load_job, parse_job
from calibration.jobs.long_context import WindowChoice, long_prompt, window_study
from calibration.jobs.long_context_job import LongContextTable, WindowTable, long_context_path, prepare_study
from calibration.models.load import load_verifier
from calibration.traces import TraceSet

PASSAGES = ["the ferry at Hallin", "it was never fast", "four times a day"]
JOB = """
verifier = "tiny"
out = "traces/pair"
seed = 5
timings = { skip = true }
model = { device = "cpu", dtype = "float32" }
prompts = { domains = ["chat"], limit_per_domain = 1 }
decoding = { max_new_tokens = 4 }

[[drafter]]
kind = "early-exit"
layers = 3
name = "half"

[[drafter]]
kind = "prompt-lookup"

[[drafter]]
kind = "windowed"
name = "narrow"
drafter = { kind = "early-exit", layers = 2 }

[long_context]
drafter = "half"
contexts = [120, 200]
prompts_per_context = 2
file = "passages.jsonl"
new_tokens = 12
gamma = 3
memory_queries = 4

[[long_context.window]]

[[long_context.window]]
sink = 1
recent = 8
memory = 32
"""
DATA = {
    "verifier": "tiny",
    "out": "o",
    "drafter": [{"kind": "early-exit", "layers": 2, "name": "half"}],
    "long_context": {"drafter": "half", "window": [{}]},
}


@pytest.fixture
def job(tmp_path):
    save_tiny(tmp_path / "tiny")
    lines = [json.dumps({"id": f"p{i}", "domain": "notes", "text": text}) for i, text in enumerate(PASSAGES)]
    (tmp_path / "passages.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "job.toml").write_text(JOB, encoding="utf-8")
    return tmp_path / "job.toml"


def with_long_context(**changes):
    return {**DATA, "long_context": {**DATA["long_context"], **changes}}


def study(**changes):
    verifier = tiny_verifier()
    drafters = [EarlyExit(layers=2, name="half").build(verifier)]
    window = (WindowTable(recent=8),)
    return prepare_study(LongContextTable(drafter="half", window=window, **changes), verifier, drafters, 0)


def test_every_key_reaches_the_settings(job):
    settings, out = load_job(job)
    assert settings.long_context == LongContextTable(
        drafter="half",
        contexts=(120, 200),
        prompts_per_context=2,
        file=str(job.parent / "passages.jsonl"),
        new_tokens=12,
        gamma=3,
        memory_queries=4,
        window=(WindowTable(), WindowTable(sink=1, recent=8, memory=32)),
    )
    assert long_context_path(out) == job.parent / "traces/pair-long-context.csv"


def test_a_job_records_and_measures_what_the_study_does(job):
    settings, out = load_job(job)
    stages = []
    calibrate(settings, out, lambda *call: stages.append(call))
    assert [call[1:] for call in stages if call[0] == "long contexts"] == [(done, 4) for done in range(1, 5)]
    verifier = load_verifier(str(job.parent / "tiny"), device="cpu", dtype="float32")
    prompts = {
        context: [long_prompt(verifier, PASSAGES, context, np.random.default_rng((5, context, i))) for i in range(2)]
        for context in (120, 200)
    }
    assert prompts[120][0] != prompts[120][1]
    windows = [WindowChoice(), WindowChoice(1, 8, 32)]
    drafter = EarlyExit(layers=3).build(verifier)
    wanted = window_study(verifier, drafter, prompts, windows, new_tokens=12, gamma=3, queries=4)
    with long_context_path(out).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["context"], r["recent"], r["memory"]) for r in rows] == [
        ("120", "", "0"),
        ("120", "8", "32"),
        ("200", "", "0"),
        ("200", "8", "32"),
    ]
    assert [float(r["mean_run"]) for r in rows] == [row.mean_run for row in wanted]
    assert [int(r["positions"]) for r in rows] == [row.positions for row in wanted]
    names = {path.name for path in out.parent.iterdir()}
    assert names == {"pair", "pair-long-context.csv", "pair-long-context.json"}
    assert TraceSet.read(out).manifest.drafter_names == ("half", "prompt-lookup", "narrow")


def test_the_same_study_is_not_measured_again(tmp_path):
    def measured(study):
        calls = []
        table = study.run(tmp_path / "out", lambda *call: calls.append(call))
        return len(calls), table.read_text(encoding="utf-8")

    shape = {"contexts": (400, 2000), "prompts_per_context": 1, "new_tokens": 8}
    times, text = measured(study(**shape))
    assert times == 2
    assert measured(study(**shape)) == (0, text)
    times, other = measured(study(**{**shape, "gamma": 2}))
    assert times == 2
    assert other != text
    assert measured(study(**shape)) == (2, text)
    note = tmp_path / "out-long-context.json"
    note.write_text("{", encoding="utf-8")
    assert measured(study(**shape)) == (2, text)
    (tmp_path / "out-long-context.csv").unlink()
    assert measured(study(**shape)) == (2, text)


def test_an_interrupted_study_keeps_the_shards_and_no_half_table(job):
    settings, out = load_job(job)

    def stop(stage, done, total):
        if stage == "long contexts":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(settings, out, stop)
    assert {path.name for path in out.parent.iterdir()} == {"pair.partial"}
    stages = []
    calibrate(settings, out, lambda *call: stages.append(call))
    assert [call for call in stages if call[0] == "record"] == [("record", 8, 8)]
    assert long_context_path(out).is_file()


def test_the_command_prints_both_paths(job):
    result = CliRunner().invoke(paceline.main, ["calibrate", str(job)])
    assert result.exit_code == 0, result.output
    out = job.parent / "traces/pair"
    assert result.output.splitlines()[-2:] == [str(out), str(long_context_path(out))]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"drafter": "hlaf"},
            "drafter: must be the name of one of the job's drafters, got 'hlaf'; did you mean 'half'?",
        ),
        ({"contexts": []}, "contexts: must have at least 1 item"),
        ({"contexts": [64, 64]}, "contexts must be unique, got one twice"),
        ({"contexts": [64, 0]}, "contexts[1]: must be >= 1, got 0"),
        ({"new_tokens": 1}, "new_tokens: must be >= 2, got 1"),
        ({"gama": 2}, "gama: no such key; did you mean 'gamma'?"),
        ({"window": [{"recent": 8, "prefil": "window"}]}, "window[0].prefil: no such key; did you mean 'prefill'?"),
        (
            {"window": [{"recent": 8}, {"memory": 16}]},
            "window[1]: recent must be given where sink, memory or prefill is",
        ),
    ],
)
def test_faults_are_told_with_their_places(changes, line):
    with pytest.raises(CalibrationError) as fault:
        parse_job(with_long_context(**changes), where="job.toml")
    told = str(fault.value)
    assert told.startswith("job.toml: long_context")
    assert line in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("name", ["prompt-lookup", "narrow"])
def test_drafters_that_cannot_have_a_window_are_refused_before_recording(job, name, monkeypatch):
    job.write_text(JOB.replace('drafter = "half"', f'drafter = "{name}"'), encoding="utf-8")
    settings, out = load_job(job)
    monkeypatch.setattr(calibration.jobs.job, "_record_shards", lambda *_: pytest.fail("recorded"))
    with pytest.raises(CalibrationError, match=f"long_context.drafter: must be a causal LM .* got '{name}'"):
        calibrate(settings, out)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"contexts": (2040,)}, "long_context.contexts: .* 2048 positions, got 2088"),
        ({"contexts": (30,)}, "long_context: passages: one must fit into 30 tokens"),
        ({"contexts": (400,), "memory_layer": 2}, "long_context.memory_layer: .* the drafter's 2 layers, got 2"),
        ({"contexts": (400,), "domains": ("chatt",)}, "long_context: .*did you mean 'chat'"),
        ({"contexts": (400,), "file": "none.toml"}, "long_context: none.toml: a prompt file must be readable"),
    ],
)
def test_what_cannot_run_is_told_before_anything_is_computed(changes, rule):
    with pytest.raises(CalibrationError, match=rule):
        study(**changes)


def test_texts_that_end_with_their_first_token_give_no_numbers(tmp_path):
    silent = study(contexts=(400,), prompts_per_context=1)
    verifier = dataclasses.replace(silent.verifier, end_ids=frozenset(range(VOCABULARY)))
    table = dataclasses.replace(silent, verifier=verifier).run(tmp_path / "out")
    with table.open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["context"], row["positions"], row["token_match"], row["mean_run"]) == ("400", "0", "", "")
