"""The recording job from end to end on a small model: complete, repeatable, resumable."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny import save_tiny

import calibration.recording.record as record_module
from calibration.common.errors import CalibrationError
from calibration.jobs.job import CalibrationSettings, calibrate, record_timings
from calibration.timing import TimingGrid
from calibration.traces import TraceSet

DRAFTERS = ("prompt-lookup", "exit-2", "skip-1-2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "mine.jsonl"
    texts = ["Tell me a story.", "Hello", "What is 2 and 3?", "abcabcabcabc", "Why"]
    rows = [{"id": f"p{i}", "domain": "ab"[i % 2], "text": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def settings(model, prompts):
    return CalibrationSettings(
        verifier=str(model),
        drafters=DRAFTERS,
        prompt_file=prompts,
        max_new_tokens=12,
        batch_size=2,
        gamma_max=3,
        rollout_stride=4,
        timings=False,
        device="cpu",
        command="paceline calibrate tiny",
    )


def test_a_job_gives_a_complete_trace_set(settings, tmp_path):
    stages = []
    traces = calibrate(settings, tmp_path / "out", lambda *step: stages.append(step))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    done = [done for stage, done, total in stages if stage == "record" and total == 72]
    assert done == sorted(done)
    assert {0, 24, 48, 72} <= set(done)  # twelve tokens written and read, in three batches
    sequences, positions = traces.frame("sequences"), traces.frame("positions")
    assert sequences.sequence_id.tolist() == ["p0", "p2", "p4", "p1", "p3"]  # domain by domain
    assert sequences.domain.tolist() == ["a", "a", "a", "b", "b"]
    assert len(positions) == 3 * sequences.output_tokens.sum()
    assert positions.run_length.notna().all()
    rollouts = traces.frame("rollouts")
    starts = sum(-(-int(n) // 4) for n in sequences.output_tokens)
    assert len(rollouts) == starts * 3 * 2
    manifest = traces.manifest
    assert manifest.drafter_names == DRAFTERS
    assert manifest.kind == "recorded"
    assert manifest.command == "paceline calibrate tiny"
    assert (manifest.verifier.name, manifest.device.kind, manifest.seed) == ("tiny", "cpu", 0)
    assert [(p.name, p.domain, p.prompts) for p in manifest.prompts] == [
        ("mine.jsonl", "a", 3),
        ("mine.jsonl", "b", 2),
    ]
    assert set(manifest.software) >= {"python", "torch", "transformers"}
    assert f"disagrees with 0 of {sequences.output_tokens.sum()} generated tokens" in " ".join(manifest.notes)


def test_the_manifest_holds_no_paths(settings, model, prompts, tmp_path):
    calibrate(settings, tmp_path / "out")
    text = (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")
    for path in (model.parent, prompts.parent, tmp_path):
        assert str(path) not in text


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_an_interrupted_job_goes_on_to_the_same_tables(settings, tmp_path, monkeypatch, sampling):
    settings = dataclasses.replace(settings, **sampling)
    whole = calibrate(settings, tmp_path / "whole")
    real, calls = record_module.record, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(record_module, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(settings, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    assert sorted(p.name for p in (tmp_path / "parts.partial").iterdir()) == ["job.json", "shard-0000"]
    resumed = calibrate(settings, tmp_path / "parts")
    assert len(calls) == 4  # one kept, one lost, two after it
    for table in ("sequences", "positions", "rollouts"):
        assert getattr(resumed, table).equals(getattr(whole, table))
    assert not (tmp_path / "parts.partial").exists()


def test_another_jobs_remains_are_not_taken_over(settings, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(record_module, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(settings, tmp_path / "out")
    with pytest.raises(CalibrationError, match="holds a job begun with max_new_tokens = 12, got 13"):
        calibrate(dataclasses.replace(settings, max_new_tokens=13), tmp_path / "out")


def test_a_folder_with_other_files_is_refused_before_any_work(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(CalibrationError, match="must be new, empty or an older TraceSet"):
        calibrate(dataclasses.replace(settings, verifier="no-such-model"), tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.tex").touch()
    with pytest.raises(CalibrationError, match="must be new or an interrupted job"):
        calibrate(settings, tmp_path / "new")


def test_seeds_matter_when_sampling_and_only_then(settings, tmp_path):
    def texts(**changes):
        traces = calibrate(dataclasses.replace(settings, **changes), tmp_path / "out")
        return traces.sequences["output_token_ids"].to_pylist()

    assert texts(seed=1) == texts(seed=2)
    hot = {"temperature": 1.0, "top_p": 0.95}
    assert texts(seed=1, **hot) == texts(seed=1, **hot)
    assert texts(seed=1, **hot) != texts(seed=2, **hot)


def test_timings_are_recorded_last_and_can_be_taken_anew(settings, tmp_path):
    small = TimingGrid((1, 2), (1, 2), (4,), (1,), (3,))
    settings = dataclasses.replace(settings, timings=True, timing_repeats=2, grid=small)
    first = calibrate(settings, tmp_path / "out")
    assert first.timings.num_rows == 2 * (1 + 4 + 3 * 2)
    again = record_timings(dataclasses.replace(settings, timing_repeats=3), tmp_path / "out")
    assert again.timings.num_rows == 3 * (1 + 4 + 3 * 2)
    assert again.manifest.drafter_names == first.manifest.drafter_names
    for table in ("sequences", "positions", "rollouts"):
        assert getattr(again, table).equals(getattr(first, table))
    assert TraceSet.read(tmp_path / "out").timings.equals(again.timings)


def test_timings_of_other_models_are_refused(settings, tmp_path):
    calibrate(settings, tmp_path / "out")
    other = dataclasses.replace(settings, verifier=str(save_tiny(tmp_path / "other")))
    with pytest.raises(CalibrationError, match=r"verifier: must be .*name='tiny'.* got .*name='other'"):
        record_timings(other, tmp_path / "out")
    with pytest.raises(CalibrationError, match=r"drafters: must be .*, got exit-2$"):
        record_timings(dataclasses.replace(settings, drafters=("exit-2",)), tmp_path / "out")


def test_prompts_longer_than_the_context_are_refused(settings, tmp_path):
    with pytest.raises(CalibrationError, match="prompt 'p0': must have 1 to 2048 tokens with max_new_tokens = 2040"):
        calibrate(dataclasses.replace(settings, max_new_tokens=2040), tmp_path / "out")


def test_every_faulty_setting_is_named_at_once():
    with pytest.raises(CalibrationError) as fault:
        CalibrationSettings(temperature=-1, top_p=0.0, batch_size=0, drafters=())
    assert str(fault.value).splitlines() == [
        "batch_size: must be >= 1, got 0",
        "temperature: must be >= 0, got -1",
        "top_p: must lie in (0, 1], got 0.0",
        "drafters: must name at least one, got none",
    ]
    with pytest.raises(CalibrationError, match=r"top_p: must be 1 where temperature is 0 \(greedy\), got 0.9"):
        CalibrationSettings(top_p=0.9)
    with pytest.raises(CalibrationError, match=r"drafters: must be unique, got exit-2, exit-2"):
        CalibrationSettings(drafters=("exit-2", "exit-2"))
