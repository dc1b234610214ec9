"""The job file of a recording: what it says is what is done, and every fault is told with its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny import save_tiny

from calibration.common.errors import CalibrationError
from calibration.drafters import EarlyExit, LayerSkip, PromptLookup
from calibration.drafters.timing import TimingGrid
from calibration.jobs.job import CalibrationSettings, calibrate
from calibration.jobs.jobfile import load_job, parse_job

JOB = """
verifier = "tiny"
out = "traces/pair"
seed = 3

[model]
device = "cpu"
dtype = "float32"

[prompts]
domains = ["chat"]
limit_per_domain = 2

[decoding]
max_new_tokens = 8
temperature = 0.7
top_p = 0.9

[record]
batch_size = 2
gamma_max = 3
rollout_stride = 4

[timings]
batches = [1]
new_tokens = [1, 2]
contexts = [4]
prefill_batches = [1]
prefill_tokens = [3]
repeats = 2

[[drafter]]
kind = "prompt-lookup"
ngram_max = 2

[[drafter]]
kind = "early-exit"
layers = 2
name = "half"
"""


def test_every_key_reaches_the_settings(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(JOB, encoding="utf-8")
    settings, out = load_job(path, "paceline calibrate job.toml")
    assert out == tmp_path / "traces/pair"
    wanted = CalibrationSettings(
        verifier="tiny",
        drafters=(PromptLookup(ngram_max=2), EarlyExit(layers=2, name="half")),
        domains=("chat",),
        limit_per_domain=2,
        max_new_tokens=8,
        temperature=0.7,
        top_p=0.9,
        seed=3,
        batch_size=2,
        gamma_max=3,
        rollout_stride=4,
        timing_repeats=2,
        device="cpu",
        dtype="float32",
        grid=TimingGrid((1,), (1, 2), (4,), (1,), (3,), repeats=2),
        command="paceline calibrate job.toml",
    )
    assert settings == wanted


def test_a_job_file_and_the_short_way_record_the_same(tmp_path):
    save_tiny(tmp_path / "tiny")
    (tmp_path / "job.toml").write_text(JOB, encoding="utf-8")
    settings, out = load_job(tmp_path / "job.toml")
    traces = calibrate(settings, out)
    assert traces.manifest.drafter_names == ("prompt-lookup", "half")
    assert traces.timings.num_rows == 2 * (1 + 2 + 2 * 1)
    short = dataclasses.replace(settings, drafters=("prompt-lookup", "exit-2"), grid=None, timings=False)
    again = calibrate(short, tmp_path / "short")
    assert again.sequences.equals(traces.sequences)
    half = again.frame("positions").query("drafter == 'exit-2'").accept_probability
    assert (
        half.to_numpy() == traces.frame("positions").query("drafter == 'half'").accept_probability.to_numpy()
    ).all()


def test_all_faults_are_told_at_once_with_their_places():
    data = {
        "verifier": "tiny",
        "sed": 1,
        "decoding": {"max_new_tokens": 0, "temprature": 1.0},
        "drafter": [{"kind": "early-exti", "layers": 2}, {"kind": "layer-skip", "first": 1}],
    }
    with pytest.raises(CalibrationError) as fault:
        parse_job(data, where="job.toml")
    lines = set(str(fault.value).splitlines())
    assert {
        "job.toml: out: must be given",
        "job.toml: sed: no such key; did you mean 'seed'?",
        "job.toml: decoding.max_new_tokens: must be >= 1, got 0",
        "job.toml: decoding.temprature: no such key; did you mean 'temperature'?",
        "job.toml: drafter[0].kind: no such kind, got 'early-exti'; did you mean 'early-exit'?",
        "job.toml: drafter[1].stop: must be given",
    } <= lines
    assert len(lines) == 6


def test_rules_across_keys_have_the_file_in_front():
    data = {"verifier": "t", "out": "o", "decoding": {"top_p": 0.5}, "drafter": [{"kind": "prompt-lookup"}] * 2}
    with pytest.raises(CalibrationError) as fault:
        parse_job(data, where="job.toml")
    assert str(fault.value).splitlines() == [
        "job.toml: top_p: must be 1 where temperature is 0 (greedy), got 0.5",
        "job.toml: drafters: must be unique, got prompt-lookup, prompt-lookup",
    ]


@pytest.mark.parametrize(("text", "rule"), [("verifier = ", "not valid TOML"), (None, "not found")])
def test_a_file_that_cannot_be_read(tmp_path, text, rule):
    path = tmp_path / "job.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(CalibrationError, match=f"job.toml: {rule}"):
        load_job(path)


def test_settings_can_be_read_without_torch():
    import subprocess
    import sys

    code = (
        "import sys\nfrom calibration.jobs.jobfile import load_job\n"
        "from calibration.drafters.kinds import AnyDrafter\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert LayerSkip(first=1, stop=2).label == "skip-1-2"
