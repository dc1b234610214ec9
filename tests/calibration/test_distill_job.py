"""The distillation job: all faults at once, resumable as a whole, results by domain; and online distillation."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distilled import tiny_corpus
from tiny import save_tiny, tiny_verifier

import calibration.training.run as run_module
from calibration.common.errors import CalibrationError
from calibration.drafters import Distilled, build_drafter
from calibration.trained.corpus import corpus_decoding
from calibration.trained.evaluate import evaluate, rounds_by_position
from calibration.trained.shapes import StudentShape, TrainSettings
from calibration.trained.trainees import load_trained
from calibration.training.jobfile import OnlineTable, load_distill_job, parse_distill_job
from calibration.training.online import Buffer, Served, make_stream, rejected, serve, shifts
from calibration.training.run import curve_texts, distill_all, gather, run_distill
from calibration.training.train import train_student

JOB = """
out = "made"

[verifier]
name = "tiny"

[corpus]
domains = ["code", "creative"]
texts_per_domain = 10
held_out = 3
max_new_tokens = 16
batch_size = 5

[training]
tokens = 400
batch_tokens = 400
curve_tokens = 200
checkpoint_tokens = 100
learning_rate = 1e-2

[[student]]
name = "generalist"
shape = { from_layers = [0, 3] }

[[student]]
name = "coder"
shape = { layers = 1, heads = 2, kv_heads = 1 }
domains = ["code"]
training = { tokens = 300, divergence = "tvd" }

[[student]]
name = "hopper"
shape = { kind = "kangaroo", exit_layer = 2 }
"""


@pytest.fixture(scope="module")
def verifier():
    return tiny_verifier(3)


@pytest.fixture
def job(tmp_path):
    (tmp_path / "job.toml").write_text(JOB)
    return load_distill_job(tmp_path / "job.toml")


def test_a_job_makes_students_and_measures_them_in_every_domain(verifier, job):
    spec, out = job
    seen = []
    results = distill_all(spec, verifier, out, lambda stage, done, total: seen.append(stage))
    assert [r.name for r in results] == ["generalist", "coder", "hopper"]
    assert [r.kind for r in results] == ["distilled", "distilled", "kangaroo"]
    assert [r.learnt_from for r in results] == [("code", "creative"), ("code",), ("code", "creative")]
    assert [r.divergence for r in results] == ["fkl", "tvd", "fkl"]
    assert 400 <= results[0].tokens < 800
    assert 300 <= results[1].tokens < 400 + 300
    assert results[0].share == results[0].parameters / verifier.info.parameters_non_embedding
    held = gather(spec, verifier, out).held_out
    assert {domain: len(texts) for domain, texts in held.items()} == {"code": 3, "creative": 3}
    for result in results:
        model, _ = load_trained(out / "students" / result.name, verifier)
        for domain, texts in held.items():
            assert result.quality[domain] == evaluate(
                model, verifier, texts, corpus_decoding(out / "corpus" / "code")
            )
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [(r["name"], r["domain"]) for r in rows] == [
        (n, d) for n in ("generalist", "coder", "hopper") for d in ("code", "creative")
    ]
    assert float(rows[2]["overlap"]) == results[1].quality["code"].overlap
    assert json.loads((out / "results.json").read_text())[1]["quality"]["creative"]["match"] == float(
        rows[3]["match"]
    )
    assert {"write training text", "train generalist", "measure hopper"} <= set(seen)
    assert build_drafter(Distilled(path=str(out / "students" / "coder")), verifier).name == "coder"


def test_a_finished_job_trains_nothing_and_a_longer_one_only_what_is_new(verifier, job, monkeypatch):
    spec, out = job
    one = spec.model_copy(update={"student": spec.student[:1]})
    first = distill_all(one, verifier, out)
    trained = []
    real = run_module.train_student

    def watched(**given):
        trained.append(given["folder"].name)
        return real(**given)

    monkeypatch.setattr(run_module, "train_student", watched)
    assert distill_all(one, verifier, out) == first
    assert trained == []
    two = distill_all(spec.model_copy(update={"student": spec.student[:2]}), verifier, out)
    assert trained == ["coder"]
    assert two[0] == first[0]
    other = spec.student[0].model_copy(update={"training": TrainSettings(tokens=401)})
    with pytest.raises(CalibrationError, match="holds a student with settings"):
        distill_all(spec.model_copy(update={"student": (other,)}), verifier, out)
    less = spec.student[0].model_copy(update={"domains": ("code",)})
    with pytest.raises(CalibrationError, match="holds a student of code, creative, got code"):
        distill_all(spec.model_copy(update={"student": (less,)}), verifier, out)


def test_an_interrupted_job_gives_what_an_uninterrupted_one_gives(verifier, job):
    spec, out = job
    spec = spec.model_copy(update={"student": spec.student[:2]})
    whole = distill_all(spec, verifier, out)

    class Cut(Exception):  # noqa: N818
        pass

    def stop(stage, done, total):
        if stage == "train coder" and done > 100:
            raise Cut

    other = out.with_name("other")
    with pytest.raises(Cut):
        distill_all(spec, verifier, other, stop)
    assert (other / "students" / "coder.partial" / "checkpoint.pt").is_file()
    again = distill_all(spec, verifier, other)
    assert [r.quality for r in again] == [r.quality for r in whole]


def test_a_model_folder_and_bundled_held_out_prompts(tmp_path):
    save_tiny(tmp_path / "tiny")
    text = JOB.replace('name = "tiny"', 'name = "tiny"\ndevice = "cpu"').replace(
        "held_out = 3", 'held_out = 2\nheld_out_prompts = "bundled"'
    )
    (tmp_path / "job.toml").write_text(text)
    spec, out = load_distill_job(tmp_path / "job.toml")
    assert spec.verifier.name == str(tmp_path / "tiny")
    results = run_distill(spec.model_copy(update={"student": spec.student[1:2]}), out)
    assert results[0].quality["creative"].held_out_tokens > 0
    assert (out / "held_out" / "corpus.json").is_file()
    assert json.loads((out / "students" / "coder" / "drafter.json").read_text())["recipe"]["texts"] == 10


def test_an_existing_folder_of_corpora(verifier, tmp_path):
    tiny_corpus(verifier, tmp_path / "texts" / "code", "code", 8)
    tiny_corpus(verifier, tmp_path / "texts" / "creative", "creative", 8)
    data = {
        "out": "o",
        "corpus": {"folder": "texts", "held_out": 2},
        "student": [{"name": "s", "shape": {"layers": 1}}],
    }
    spec, out = parse_distill_job(data, folder=tmp_path)
    found = gather(spec, verifier, out)
    assert {d: (len(t), len(found.held_out[d])) for d, t in found.texts.items()} == {
        "code": (6, 2),
        "creative": (6, 2),
    }
    assert not out.exists()
    data["corpus"]["texts_per_domain"] = {"code": 5}
    spec, out = parse_distill_job(data, folder=tmp_path)
    assert {d: len(t) for d, t in gather(spec, verifier, out).texts.items()} == {"code": 3, "creative": 6}
    assert [t.domain for t in curve_texts(found.held_out, ("code", "creative"))] == ["code", "creative"] * 2
    tiny_corpus(verifier, tmp_path / "texts" / "chat", "chat", 3, temperature=0.0)
    with pytest.raises(CalibrationError, match="at one temperature"):
        gather(spec, verifier, out)
    data["corpus"] = {"folder": "nowhere"}
    spec, out = parse_distill_job(data, folder=tmp_path)
    with pytest.raises(CalibrationError, match="must be a corpus or a folder of corpora, got"):
        gather(spec, verifier, out)


def test_all_faults_are_told_at_once_with_their_places(tmp_path):
    data = {
        "out": "o",
        "verifier": {"nam": "x"},
        "corpus": {"folder": "f", "held_out": 0},
        "training": {"divergence": "fk", "on_policy": 2.0},
        "student": [
            {"name": "a", "shape": {"layers": 1, "heads": 0}},
            {"name": "b", "shape": {"kind": "kangaro", "exit_layer": 1}},
            {"name": "c", "shape": {"from_layers": [0]}, "training": {"token": 3}},
        ],
    }
    with pytest.raises(CalibrationError) as fault:
        parse_distill_job(data, where="job.toml")
    lines = str(fault.value).splitlines()
    assert all(line.startswith("job.toml: ") for line in lines)
    for part in (
        "verifier.nam: no such key; did you mean 'name'?",
        "corpus.held_out: must be >= 1, got 0",
        "training.divergence: must be one of fkl, jsd, rkl, tvd, tvd++, got 'fk'; did you mean 'fkl'?",
        "training.on_policy: must be",
        "student[0].shape.heads: must be >= 1, got 0",
        "student[1].shape.kind: no such kind, got 'kangaro'; did you mean 'kangaroo'?",
        "student[2].training.token: no such key; did you mean 'tokens'?",
    ):
        assert any(part in line for line in lines), (part, lines)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"corpus": {"folder": "f", "prompt_file": "p.toml"}}, "at most one of folder and prompt_file"),
        ({"corpus": {"domains": ["code"]}}, "texts_per_domain must be given"),
        ({"corpus": {"domains": ["cod"], "texts_per_domain": 50}}, "got 'cod'"),
        ({"corpus": {"domains": ["code", "chat"], "texts_per_domain": {"chat": 50}}}, "got none of code"),
        ({"corpus": {"folder": "f", "texts_per_domain": {"code": 0}}}, "a number >= 1, or one for each domain"),
        ({"corpus": {"folder": "f", "texts_per_domain": 16}}, "must be more than held_out = 16"),
        ({"student": [{"name": "a/b", "shape": {"layers": 1}}]}, "must be a file name"),
        ({"student": [{"name": "a", "shape": {"layers": 1}}] * 2}, "must be unique, got 'a'"),
        ({"online": {"student": "z", "domains": ["code"]}}, "must be a student's name, got 'z'"),
        ({"student": []}, "student"),
    ],
)
def test_inconsistent_jobs_are_refused(change, rule):
    data = {"out": "o", "corpus": {"folder": "f"}, "student": [{"name": "a", "shape": {"layers": 1}}], **change}
    with pytest.raises(CalibrationError, match=rule):
        parse_distill_job(data)


def test_recipes_are_jobs():
    recipes = sorted((Path(__file__).resolve().parents[2] / "recipes" / "distill").glob("*.toml"))
    assert len(recipes) >= 3
    for path in recipes:
        spec, _ = load_distill_job(path)
        assert spec.settings(spec.student[0]).loss_vocabulary == 8192


# Online distillation.


def test_rejections_are_those_of_live_rounds():
    rng = np.random.default_rng(0)
    assert rejected(np.ones(20), 4, rng).tolist() == []
    assert rejected(np.zeros(5), 4, rng).tolist() == [1, 2, 3, 4]
    sure = np.ones(20)
    sure[[3, 6, 7]] = 0.0
    # Rounds of 4 begin at 1 (rejected at 3), 4 (at 6), 7 (at 7), 8, 13, 18.
    assert rejected(sure, 4, rng).tolist() == [3, 6, 7]
    sure = np.ones(20)
    sure[5] = 0.0
    assert rejected(sure, 4, rng).tolist() == []  # x_5 is the bonus token of the round at 1
    accept = rng.random(15)
    counts = [len(rejected(accept, 3, rng)) for _ in range(4000)]
    # A round either rejects or drafts to its end: rejections are rounds less those that were accepted in full.
    assert 0 < np.mean(counts) < rounds_by_position(accept, 3)


def test_the_buffer_keeps_the_last_rejections(verifier, tmp_path):
    texts = [text for text in tiny_corpus(verifier, tmp_path / "c", count=12) if len(text.output_ids) > 6][:4]
    buffer = Buffer(5)
    buffer.add(texts[0], np.array([1, 2]))
    buffer.add(texts[1], np.array([], dtype=np.int64))
    buffer.add(texts[2], np.array([0, 3]))
    assert len(buffer) == 4
    buffer.add(texts[3], np.array([4, 5]))
    assert len(buffer) == 4  # the oldest request has gone
    batch = buffer.draw(8, np.random.default_rng(0), verifier.device)
    wanted = {(texts[2].output_ids[i]) for i in (0, 3)} | {texts[3].output_ids[i] for i in (4, 5)}
    assert set(batch.targets.tolist()) == wanted
    flat = batch.tokens.flatten()
    for place, target, state in zip(batch.places.tolist(), batch.targets.tolist(), batch.states, strict=True):
        text = next(t for t in texts[2:4] if any(np.array_equal(state.numpy(), s) for s in t.states))
        at = next(i for i in range(len(text.output_ids)) if np.array_equal(state.numpy(), text.states[i]))
        assert text.output_ids[at] == target
        assert int(flat[place]) == [*text.prompt_ids, *text.output_ids][len(text.prompt_ids) + at - 1]


def test_a_learning_drafter_recovers_from_a_shift_and_a_frozen_one_does_not(verifier, tmp_path):
    """A few requests that come again and again, first of one domain, then of another, then of the first."""
    decoding = None
    texts = {}
    for domain in ("code", "creative"):
        texts[domain] = tiny_corpus(verifier, tmp_path / domain, domain, 4)
        decoding = corpus_decoding(tmp_path / domain)
    training = TrainSettings(tokens=3000, batch_tokens=128, learning_rate=1e-2, curve_tokens=3000)
    shape = StudentShape(from_layers=(0, 2, 3))
    train_student(verifier, shape, texts["code"], texts["code"], decoding, training, tmp_path / "s")
    stream = [(phase, texts[d][i % 4]) for phase, d in enumerate(("code", "creative", "code")) for i in range(12)]
    settings = OnlineTable(student="s", domains=("code",), interval=1, steps=2, learning_rate=1e-2, buffer=64)
    before = {name: t.clone() for name, t in load_trained(tmp_path / "s", verifier)[1].items()}
    served = serve(verifier, tmp_path / "s", stream, decoding, settings, training)
    away, back = shifts(served)
    assert (away.before_domain, away.after_domain) == ("code", "creative")
    assert away.drift < -0.05
    assert away.recovery > 0.05
    assert away.last > away.frozen_last + 0.05
    assert abs(away.frozen_last - away.frozen_first) < 1e-9  # the same four texts in each third
    assert back.recovery > -0.02
    assert served[-1].steps == (len(stream) - 1) * 2
    again = serve(verifier, tmp_path / "s", stream[:6], decoding, settings, training)
    assert again == served[:6]
    after = load_trained(tmp_path / "s", verifier)[1]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shifts_average_thirds():
    rows = [Served(i, i // 6, "ab"[i // 6 % 2], 0.5, float(i), 0) for i in range(18)]
    one, two = shifts(rows)
    assert (one.before, one.first, one.last) == (4.5, 6.5, 10.5)
    assert (one.drift, one.recovery) == (2.0, 4.0)
    assert (two.before_domain, two.after_domain, two.before) == ("b", "a", 10.5)


def test_a_job_with_online_distillation(verifier, tmp_path):
    text = JOB.replace("texts_per_domain = 10", "texts_per_domain = 14") + (
        '\n[online]\nstudent = "coder"\ndomains = ["code", "creative", "code"]\nrequests = 3\n'
        "interval = 1\nsteps = 1\n"
    )
    (tmp_path / "job.toml").write_text(text)
    spec, out = load_distill_job(tmp_path / "job.toml")
    spec = spec.model_copy(update={"student": spec.student[1:2]})
    found = gather(spec, verifier, out)
    streamed = {text.prompt_id for _, text in found.stream}
    assert len(streamed) == 9
    assert not streamed & {text.prompt_id for texts in found.texts.values() for text in texts}
    distill_all(spec, verifier, out)
    rows = list(csv.DictReader((out / "online.csv").read_text().splitlines()))
    assert [row["domain"] for row in rows] == ["code"] * 3 + ["creative"] * 3 + ["code"] * 3
    assert rows[0]["frozen"] == rows[0]["online"]
    assert rows[-1]["frozen"] != rows[-1]["online"]
    assert len((out / "shifts.csv").read_text().splitlines()) == 3
    stamp = (out / "online.csv").stat().st_mtime_ns
    distill_all(spec, verifier, out)
    assert (out / "online.csv").stat().st_mtime_ns == stamp
    with pytest.raises(CalibrationError, match="must have 40 texts of code for its phases, got 11"):
        make_stream({"code": range(11)}, OnlineTable(student="coder", domains=("code", "code"), requests=20))
