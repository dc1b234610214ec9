"""Training: students learn, resume to the very same weights, and draw an honest learning curve."""

from __future__ import annotations

import csv
import itertools

import numpy as np
import pytest
import torch
from distilled import tiny_corpus
from tiny import tiny_verifier

import calibration.training.learner as learner_module
from calibration.common.errors import CalibrationError
from calibration.models.sampling import distribution, generator_for
from calibration.trained.corpus import collate, corpus_decoding, epoch_order, frequent_tokens
from calibration.trained.evaluate import evaluate, final_states, rounds_by_position
from calibration.trained.shapes import KangarooShape, NestedShape, StudentShape, TrainSettings
from calibration.trained.students import build_student
from calibration.trained.trainees import load_trained
from calibration.training.learner import Learner, LossHead, divergence, forward_kl
from calibration.training.train import Training, train_student

FAST = TrainSettings(tokens=3000, batch_tokens=128, learning_rate=1e-2, curve_tokens=1000, checkpoint_tokens=800)


@pytest.fixture(scope="module")
def verifier():
    return tiny_verifier(3)


@pytest.fixture(scope="module")
def corpus(verifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "code"
    return tiny_corpus(verifier, folder, count=40), corpus_decoding(folder)


def trained(verifier, corpus, folder, shape, settings=FAST, **options):
    texts, decoding = corpus
    return train_student(verifier, shape, texts[8:], texts[:8], decoding, settings, folder, **options)


@pytest.mark.parametrize(
    "shape",
    [
        StudentShape(layers=2, intermediate_size=40),
        StudentShape(from_layers=(0, 3)),
        NestedShape(from_layers=(0, 1, 3), exits=(1, 2)),
        KangarooShape(exit_layer=2),
    ],
    ids=["fresh", "copied", "nested", "kangaroo"],
)
def test_training_lowers_the_divergence_and_raises_acceptance(verifier, corpus, tmp_path, shape):
    """On text that it learns from: what a random verifier writes to other prompts, nothing small can learn."""
    texts, decoding = corpus
    found = train_student(verifier, shape, texts, texts[:8], decoding, FAST, tmp_path / "s")
    before, after = found.curve[0], found.curve[-1]
    assert found.curve[1]["loss"] > after["loss"] > 0
    assert after["overlap"] > before["overlap"] + 0.01
    assert after["tokens_per_round"] > before["tokens_per_round"]
    assert after["tokens"] >= FAST.tokens > after["tokens"] - FAST.batch_tokens


@pytest.mark.parametrize(
    "shape", [StudentShape(from_layers=(0, 3)), KangarooShape(exit_layer=2)], ids=["copied", "kangaroo"]
)
def test_students_train_in_float32_beside_a_verifier_in_half_precision(tmp_path, shape):
    half = tiny_verifier(3, dtype="bfloat16")
    texts = tiny_corpus(half, tmp_path / "code", count=10)
    settings = FAST.model_copy(update={"on_policy": 0.2, "loss_vocabulary": 60, "tokens": 2000})
    decoding = corpus_decoding(tmp_path / "code")
    found = train_student(half, shape, texts, texts[:4], decoding, settings, tmp_path / "s")
    assert found.quality.overlap > found.curve[0]["overlap"] + 0.02
    model, tensors = load_trained(tmp_path / "s", half)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert evaluate(model, half, texts[:4], decoding).overlap == pytest.approx(found.quality.overlap, abs=0.05)


@pytest.mark.parametrize("name", ["rkl", "jsd", "tvd", "tvd++"])
def test_every_divergence_teaches(verifier, corpus, tmp_path, name):
    settings = FAST.model_copy(update={"divergence": name})
    found = trained(verifier, corpus, tmp_path / "s", StudentShape(from_layers=(0, 3)), settings)
    assert found.quality.overlap > found.curve[0]["overlap"] + 0.01


def test_the_verifier_is_left_as_it_was(verifier, corpus, tmp_path):
    before = {name: tensor.clone() for name, tensor in verifier.model.state_dict().items()}
    trained(verifier, corpus, tmp_path / "a", StudentShape(from_layers=(0,)))
    trained(verifier, corpus, tmp_path / "b", KangarooShape(exit_layer=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in verifier.model.state_dict().items())
    assert not any(tensor.requires_grad for tensor in verifier.model.parameters())


@pytest.mark.parametrize("on_policy", [0.0, 0.3])
def test_a_resumed_training_gives_the_same_weights_and_curve(verifier, corpus, tmp_path, on_policy, monkeypatch):
    settings = FAST.model_copy(
        update={"on_policy": on_policy, "loss_vocabulary": 40, "loss_others": 8, "tokens": 1800}
    )
    shape = StudentShape(from_layers=(1,))
    whole = trained(verifier, corpus, tmp_path / "whole", shape, settings)

    class Cut(Exception):  # noqa: N818
        pass

    def stop(stage, done, total):
        if done > 1000:
            raise Cut

    with pytest.raises(Cut):
        trained(verifier, corpus, tmp_path / "cut", shape, settings, progress=stop)
    assert (tmp_path / "cut.partial" / "checkpoint.pt").is_file()
    assert not (tmp_path / "cut").exists()
    steps = []
    real = Learner.step
    monkeypatch.setattr(Learner, "step", lambda *given: steps.append(1) or real(*given))
    again = trained(verifier, corpus, tmp_path / "cut", shape, settings)
    assert 0 < len(steps) < 1800 / 80
    for (name, a), (_, b) in zip(whole.student.state_dict().items(), again.student.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    timeless = [[{**row, "seconds": 0} for row in run.curve] for run in (whole, again)]
    assert repr(timeless[0]) == repr(timeless[1])
    assert not (tmp_path / "cut.partial").exists()


def test_a_checkpoint_of_another_training_is_refused(verifier, corpus, tmp_path):
    texts, decoding = corpus
    args = (texts[8:], texts[:8], decoding)
    run = Training(verifier, StudentShape(layers=1), *args, FAST, tmp_path / "s")
    run.state.curve.append({"tokens": 0})
    run._save()
    other = Training(verifier, StudentShape(layers=2), *args, FAST, tmp_path / "s")
    with pytest.raises(CalibrationError, match=r"holds a training with shape = .*'layers': 1"):
        other.resume()
    with pytest.raises(CalibrationError, match="held-out ones, got none"):
        Training(verifier, StudentShape(layers=1), texts, [], decoding, FAST, tmp_path / "s")


def test_the_curve_stands_beside_the_weights(verifier, corpus, tmp_path):
    found = trained(verifier, corpus, tmp_path / "s", StudentShape(layers=1))
    rows = list(csv.DictReader((tmp_path / "s" / "curve.csv").read_text().splitlines()))
    assert [float(row["overlap"]) for row in rows] == [row["overlap"] for row in found.curve]
    marks = [int(row["tokens"]) // FAST.curve_tokens for row in rows]
    assert marks == [0, 1, 2, 3]
    assert rows[0]["loss"] == ""


def test_an_on_policy_batch_is_the_students_text_with_the_verifiers_states(verifier, corpus, tmp_path):
    texts, decoding = corpus
    settings = FAST.model_copy(update={"on_policy": 1.0})
    run = Training(verifier, StudentShape(from_layers=(0, 3)), texts[8:], texts[:8], decoding, settings, tmp_path)
    own = run._own_texts(texts[:3], step=5)
    assert [text.output_ids for text in own] != [text.output_ids for text in texts[:3]]
    for text in own:
        ids = [*text.prompt_ids, *text.output_ids]
        with torch.inference_mode():
            seen = verifier.model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        wanted = seen[len(text.prompt_ids) - 1 : -1].to(torch.float16)
        assert np.allclose(wanted.numpy(), text.states, atol=2e-3)
    batch = run._batch(texts[:3], 5)
    assert batch.targets.tolist() == [token for text in own for token in text.output_ids]


def test_the_loss_is_the_mean_divergence_over_output_positions(verifier, corpus, tmp_path, monkeypatch):
    """Against one forward pass per text with plain attention, and autograd through everything at once."""
    texts, decoding = corpus
    for positions in (7, 1000):
        monkeypatch.setattr(learner_module, "LOSS_POSITIONS", positions)
        run = Training(verifier, StudentShape(from_layers=(0, 3)), texts, texts, decoding, FAST, tmp_path)
        batch = collate(texts[:5], verifier.device)
        hidden = run.learner.trainee.states(batch)[0]
        loss, gradient = run.learner.loss(hidden.detach(), batch.states)
        hidden.backward(gradient)
        mine = {name: w.grad.clone() for name, w in run.weights.items()}
        for w in run.weights.values():
            w.grad = None
        head, parts = verifier.model.get_output_embeddings(), []
        for text in texts[:5]:
            ids = torch.tensor([[*text.prompt_ids, *text.output_ids]])
            q_logits = run.student(input_ids=ids, use_cache=False).logits[0, len(text.prompt_ids) - 1 : -1]
            parts.append(forward_kl(head(torch.from_numpy(np.array(text.states)).double()), q_logits))
        wanted = torch.cat(parts).mean()
        wanted.backward()
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-9)
        for name, w in run.weights.items():
            assert torch.allclose(w.grad, mine[name], atol=1e-9), name


def test_other_tokens_stand_for_all_of_those_left_out(verifier, corpus):
    texts, _ = corpus
    head = verifier.model.get_output_embeddings()
    settings = FAST.model_copy(update={"loss_vocabulary": 30, "loss_others": 10, "temperature": 2.0})
    states = torch.from_numpy(np.array(texts[0].states)).double()
    part = LossHead(head, texts, settings, torch.float64)
    sums = []
    for seed in range(400):
        part.draw(generator_for(verifier.device, seed))
        assert part.logits(states).shape == (len(states), 40)
        sums.append(part.logits(states).exp().sum(-1))
    whole = (head(states) / 2.0).exp().sum(-1)
    sums = torch.stack(sums)
    error = sums.std(0) / len(sums) ** 0.5
    assert ((sums.mean(0) - whole).abs() < 4 * error).all()
    every = LossHead(head, texts, settings.model_copy(update={"loss_vocabulary": None}), torch.float64)
    every.draw(generator_for(verifier.device, 0))
    assert torch.allclose(every.logits(states), head(states) / 2.0)


def test_frequent_tokens_are_counted_in_the_outputs(corpus):
    texts, _ = corpus
    counts = np.bincount([t for text in texts for t in text.output_ids], minlength=97)
    kept = frequent_tokens(texts, 12, 97).tolist()
    assert counts[kept].min() >= np.delete(counts, kept).max()
    assert sorted(kept) == kept
    assert frequent_tokens(texts[:1], 90, 97).tolist()[:3] == [0, 1, 2]


def test_an_epoch_shows_every_text_once_in_batches_of_bounded_size(corpus):
    texts, _ = corpus
    first, second = (epoch_order(texts, 128, 0, epoch) for epoch in (0, 1))
    lengths = [len(t.prompt_ids) + len(t.output_ids) - 1 for t in texts]
    for order in (first, second):
        assert sorted(i for rows in order for i in rows) == list(range(len(texts)))
        assert all(len(rows) * max(lengths[i] for i in rows) <= 128 for rows in order)
    assert first != second
    assert first == epoch_order(texts, 128, 0, 0)
    assert [len(rows) for rows in epoch_order(texts, 1, 0, 0)] == [1] * len(texts)


def test_quality_is_that_of_plain_passes(verifier, corpus):
    texts, decoding = corpus
    student = build_student(
        verifier, StudentShape(from_layers=(0, 2, 3)), generator_for(verifier.device, 0), torch.float64
    )
    found = evaluate(student.requires_grad_(False), verifier, texts[:9], decoding)
    matches, overlaps, rounds = [], [], 0.0
    for text in texts[:9]:
        ids = torch.tensor([[*text.prompt_ids, *text.output_ids]])
        logits = [
            m(input_ids=ids, use_cache=False).logits[0, len(text.prompt_ids) - 1 : -1]
            for m in (verifier.model, student)
        ]
        p, q = (distribution(part, decoding.temperature) for part in logits)
        matches += (logits[0].argmax(-1) == logits[1].argmax(-1)).tolist()
        overlaps += torch.minimum(p, q).sum(-1).tolist()
        at = torch.arange(len(text.output_ids)), torch.tensor(text.output_ids)
        rounds += rounds_by_position((q[at] / p[at]).clamp(max=1).double().numpy(), 4)
    assert found.match == pytest.approx(np.mean(matches), abs=0.02)
    assert found.overlap == pytest.approx(np.mean(overlaps), abs=1e-3)
    assert found.tokens_per_round == pytest.approx((len(matches) - 9) / rounds, abs=1e-3)
    assert found.held_out_tokens == len(matches)


@pytest.mark.parametrize("gamma", [1, 4])
def test_expected_rounds_are_those_of_a_simulation(gamma):
    rng = np.random.default_rng(0)
    accept = rng.random(12)
    counts = []
    for _ in range(20_000):
        t, rounds = 1, 0
        luck = rng.random(12)
        while t < 12:
            run = 0
            while run < gamma and t + run < 12 and luck[t + run] < accept[t + run]:
                run += 1
            t, rounds = t + run + 1, rounds + 1
        counts.append(rounds)
    assert rounds_by_position(accept, gamma) == pytest.approx(np.mean(counts), abs=4 * np.std(counts) / 20_000**0.5)
    assert rounds_by_position(np.ones(12), 4) == 3.0  # rounds at 1, 6, 11
    assert rounds_by_position(np.zeros(12), 4) == 11.0
    assert rounds_by_position(np.ones(1), 4) == 0.0


def test_prompts_are_context_and_padding_is_never_seen(verifier, corpus):
    texts, _ = corpus
    student = build_student(verifier, StudentShape(layers=1), generator_for(verifier.device, 0), torch.float64)
    together = final_states(student, collate(texts[:4], verifier.device))
    alone = torch.cat([final_states(student, collate([text], verifier.device)) for text in texts[:4]])
    assert torch.allclose(together, alone, atol=1e-12)


def test_the_rate_rises_and_falls():
    settings = TrainSettings(tokens=1000, warmup=0.1)
    rates = [settings.rate(t) for t in range(0, 1001, 10)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] < 0.1
    assert rates[-1] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert divergence("fkl") is forward_kl
