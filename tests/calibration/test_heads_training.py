"""Training heads: what they are trained on, that it helps, that it resumes; their job file."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from heads_made import KINDS, built_head, head_shape, written_texts
from safetensors.torch import load_file
from tiny import save_tiny, tiny_verifier

from calibration.common.errors import CalibrationError
from calibration.models.load import load_verifier
from calibration.models.sampling import generator_for
from calibration.prompts import Prompt
from calibration.traces import DecodingInfo
from calibration.trained.corpus import write_corpus
from calibration.trained.evaluate import expected_rounds
from calibration.trained.folder import read_about
from calibration.trained.heads import fresh_head
from calibration.trained.shapes import HeadSettings, HeadShape
from calibration.training.head_job import load_heads_job, parse_heads_job, run_heads
from calibration.training.head_train import HeadTraining, PairReader, evaluate_head, train_head

CPU = torch.device("cpu")
GREEDY = DecodingInfo(mode="greedy")
SAMPLED = DecodingInfo(mode="sampled", temperature=0.8)
RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "heads"


def settings(**changes):
    own = {"tokens": 1500, "batch_tokens": 150, "bfloat16": False, "learning_rate": 5e-3, "curve_tokens": 10**6}
    return HeadSettings(**{**own, **changes})


@pytest.fixture(scope="module")
def texts(tiny):
    return written_texts(tiny, 24, 20, GREEDY)


@pytest.fixture(scope="module")
def small():
    """A verifier with a vocabulary of 7, of which a moment teaches enough to be told on text never seen."""
    verifier = tiny_verifier(5, vocabulary=7, spread=0.35, dtype="float32")
    return verifier, written_texts(verifier, 70, 24, SAMPLED)


# The pairs.


@pytest.mark.parametrize("prompts", [True, False])
def test_pairs_are_the_verifiers_states_and_the_tokens_behind_them(tiny, texts, prompts):
    mine = sorted(texts, key=lambda text: len(text.prompt_ids))[::4]
    assert {1, 2} <= {len(text.prompt_ids) for text in mine}
    batch = PairReader(tiny.model, prompts=prompts).batch(mine, torch.float64)
    for row, text in enumerate(mine):
        ids = [*text.prompt_ids, *text.output_ids]
        skipped = 0 if prompts else len(text.prompt_ids) - 1
        states = tiny.model.model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state[0]
        real = batch.real[row]
        assert batch.tokens[row, real].tolist() == ids[skipped + 1 :]
        assert batch.features[row, real].numpy() == pytest.approx(states[skipped:].numpy(), rel=2e-3, abs=2e-3)
        first = max(0, len(text.prompt_ids) - 2 - skipped) if prompts else 0
        starts = batch.starts()[row].nonzero()[:, 0].tolist()
        assert starts == list(range(first, len(ids) - skipped - 2))


def test_targets_are_the_tokens_drafted_and_the_states_that_predicted_them(tiny, texts):
    """Greedy text: the token is the largest logit of its state, at every depth."""
    batch = PairReader(tiny.model, prompts=True).batch(texts[:6], torch.float64)
    head = tiny.model.get_output_embeddings()
    last = torch.arange(batch.real.shape[1]).expand(6, -1)
    for step in range(4):
        state, token, known = batch.targets(last, step)
        output = known & (last + step + 1 > batch.first[:, None] + 1)  # the prompt's tokens were not chosen
        assert bool(output.any())
        assert (head(state).argmax(-1) == token)[output].all()
        shifted = batch.tokens[:, step + 1 :]
        assert (token[:, : shifted.shape[1]] == shifted)[known[:, : shifted.shape[1]]].all()
        assert known.sum(1).tolist() == (batch.real.sum(1) - step - 1).tolist()


# What is measured.


@pytest.mark.parametrize("depth", [1, 3])
def test_expected_rounds_are_those_of_every_possible_walk(depth):
    """Enumerate which of the drafts from every start would be accepted, walk each, and weigh."""
    rng = np.random.default_rng(depth)
    count = 4
    accept = rng.uniform(0.1, 0.9, (count, depth))
    inside = [(t, j) for t in range(count) for j in range(depth) if t + j < count]
    total = 0.0
    for outcome in itertools.product((True, False), repeat=len(inside)):
        taken = dict(zip(inside, outcome, strict=True))
        chance = np.prod([accept[key] if yes else 1 - accept[key] for key, yes in taken.items()])
        t, rounds = 0, 0
        while t < count:
            j = 0
            while j < depth and taken.get((t, j), True):
                j += 1
            t, rounds = t + j + 1, rounds + 1
        total += chance * rounds
    padded = np.where([[t + j < count for j in range(depth)] for t in range(count)], accept, np.nan)
    assert expected_rounds(padded) == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_quality_is_that_of_the_drafts_recorded(tiny, tmp_path, kind, decoding):
    """The measure reads stored states; the recording reads the text. Both see the same drafts."""
    from calibration.models.drafter import Read

    texts = written_texts(tiny, 6, 16, decoding, seed=5, low=2)
    short = HeadShape(tokens=3)
    train_head(kind, tiny, short, texts, texts[:1], decoding, settings(tokens=600), tmp_path / kind)
    drafter = built_head(kind, tiny, tmp_path / kind)
    reader = PairReader(tiny.model, prompts=True)
    quality = evaluate_head(drafter.head, tiny.model, reader, texts, decoding, torch.float64)
    rounds, emitted, same = 0.0, 0, []
    for text in texts:
        ids = torch.tensor([[*text.prompt_ids, *text.output_ids][:-1]])
        states = tiny.model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        sampled = Read(tiny.model, text.prompt_ids, text.output_ids, SAMPLED, {"norm": states}, {})
        plain = Read(tiny.model, text.prompt_ids, text.output_ids, GREEDY, {"norm": states}, {})
        with torch.inference_mode():
            accept = drafter.drafts(sampled, 3, generator_for(CPU, 0)).accept.astype(float)
            drafted = drafter.drafts(plain, 3, generator_for(CPU, 0)).tokens
        tokens = np.array([*text.output_ids, -9, -9, -9])
        own = tiny.model.get_output_embeddings()(states[len(text.prompt_ids) - 1 :]).argmax(-1).tolist()
        same += [drafted[t, 0] == own[t] for t in range(len(own))]
        if decoding.mode == "greedy":
            window = np.lib.stride_tricks.sliding_window_view(tokens, 3)[: len(accept)]
            hits = np.logical_and.accumulate(drafted == window, 1).astype(float)
            accept = np.where(window < 0, np.nan, hits)
        # Drafts behind a wrong one do not matter to a walk, and the free run differs from the text there.
        rounds += expected_rounds(accept)
        emitted += len(accept)
    assert quality.match[0] == pytest.approx(np.mean(same), abs=1e-9)
    assert quality.tokens_per_round == pytest.approx(emitted / rounds, rel=5e-3)
    assert quality.tokens == sum(len(text.output_ids) for text in texts)


# Training.


@pytest.mark.parametrize("kind", KINDS)
def test_a_moment_of_training_beats_the_untrained_head(small, tmp_path, kind):
    verifier, texts = small
    plan = settings(tokens=6000)
    done = train_head(kind, verifier, HeadShape(tokens=3), texts[10:], texts[:10], SAMPLED, plan, tmp_path / kind)
    first, last = done.curve[0], done.curve[-1]
    assert first["tokens"] == 0
    assert last["tokens"] >= 6000
    assert last["tokens_per_round"] > 1.05 * first["tokens_per_round"]
    assert last["match_1"] > first["match_1"]
    with (tmp_path / kind / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["loss"] == ""
    assert [float(row["tokens_per_round"]) for row in rows] == [r["tokens_per_round"] for r in done.curve]
    about = read_about(tmp_path / kind)
    assert about["recipe"]["tokens"] == last["tokens"]
    assert about["recipe"]["held_out"]["match_1"] == last["match_1"] == done.quality.match[0]
    assert not (tmp_path / f"{kind}.partial").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tiny, texts, tmp_path, kind):
    plan = settings(tokens=900, checkpoint_tokens=200, curve_tokens=400, noise=0.1, starts=7)

    class StopError(Exception):
        pass

    def stop(stage, done, total):
        if done >= 500:
            raise StopError

    def train(folder, progress=None):
        return train_head(
            kind, tiny, head_shape(kind), texts[4:], texts[:2], GREEDY, plan, tmp_path / folder, progress
        )

    whole = train("whole")
    with pytest.raises(StopError):
        train("again", stop)
    assert not (tmp_path / "again").exists()
    resumed = train("again")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    drop = {"seconds"}
    for one, two in zip(whole.curve, resumed.curve, strict=True):
        assert {k: v for k, v in one.items() if k not in drop and v == v} == {
            k: v for k, v in two.items() if k not in drop and v == v
        }


def test_a_checkpoint_of_another_training_is_refused(tiny, texts, tmp_path):
    run = HeadTraining("medusa", tiny, HeadShape(tokens=2), texts, texts[:1], GREEDY, settings(), tmp_path / "head")
    run.state.curve.append({"tokens": 0})
    run._save()
    other = HeadTraining("medusa", tiny, HeadShape(tokens=3), texts, texts[:1], GREEDY, settings(), tmp_path / "head")
    with pytest.raises(CalibrationError, match=r"holds a training with shape = .* choose another folder"):
        other.resume()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_has_the_gradient_of_its_own_value(tiny, texts, kind):
    """The gradient taken chunk by chunk is that of the loss written out in one piece."""
    plan = settings(regression=2.0, depth_decay=0.5, loss_vocabulary=None)
    run = HeadTraining(kind, tiny, head_shape(kind), texts, texts[:1], GREEDY, plan, Path("unused"))
    batch = run.reader.batch(texts[:4], torch.float32)
    drafts = run._drafts(batch, generator_for(CPU, 0))
    value, gradient = run._loss(drafts)
    depth = run.shape.tokens
    weights = torch.tensor([0.5**j for j in range(depth)])
    weights = weights / weights.mean()
    assert sorted(drafts.weight.unique().tolist()) == pytest.approx(sorted(weights.tolist()))
    features = drafts.features.detach().requires_grad_(True)
    head = tiny.model.get_output_embeddings().weight.float()
    p, q = (drafts.states @ head.T).log_softmax(-1), (features @ head.T).log_softmax(-1)
    gap = (features - drafts.states).abs()
    smooth = torch.where(gap < 1, 0.5 * gap * gap, gap - 0.5).mean(-1)
    loss = (drafts.weight * ((p.exp() * (p - q)).sum(-1) + 2.0 * smooth)).mean()
    loss.backward()
    assert value == pytest.approx(float(loss.detach()), rel=1e-4)
    assert gradient.numpy() == pytest.approx(features.grad.numpy(), rel=1e-3, abs=1e-7)


def test_starts_are_drawn_among_those_that_can_be_compared(tiny, texts):
    plan = settings(starts=5)
    run = HeadTraining("medusa", tiny, HeadShape(tokens=2), texts, texts[:1], GREEDY, plan, Path("unused"))
    batch = run.reader.batch(texts[:8], torch.float32)
    seen = torch.zeros_like(batch.real)
    for seed in range(60):
        last, mine = run._starts(batch, generator_for(CPU, seed))
        assert last.shape == (8, 5)
        assert batch.starts().gather(1, last)[mine].all()
        for row in range(8):
            chosen = last[row, mine[row]].tolist()
            assert len(set(chosen)) == len(chosen) == min(5, int(batch.starts()[row].sum()))
            seen[row, chosen] = True
    assert torch.equal(seen, batch.starts())


def test_bfloat16_and_a_cut_vocabulary_train_too(small, tmp_path):
    verifier, texts = small
    plan = settings(tokens=1500, bfloat16=True, loss_vocabulary=4, loss_others=2)
    for kind in KINDS:
        done = train_head(kind, verifier, HeadShape(tokens=2), texts[10:], texts[:10], SAMPLED, plan, tmp_path / kind)
        assert done.curve[-1]["tokens_per_round"] > done.curve[0]["tokens_per_round"]


def test_an_untrained_medusa_repeats_the_verifiers_own_token(tiny):
    """W = b = 0: the features of every head are the state itself."""
    shape = HeadShape(tokens=3, layers=2).for_verifier("medusa", tiny)
    head = fresh_head("medusa", shape, tiny.model, torch.Generator())
    states = torch.randn(2, 4, 32)
    past = head.read(None, states, states, torch.ones(2, 4, dtype=torch.bool))
    found = head.unroll(past, past.branches(torch.tensor([[1], [3]])), 3, lambda step, g: g)
    for features in found:
        assert torch.equal(features[:, 0], states[[0, 1], [1, 3]])


# Shapes and the job file.


def test_a_shape_takes_what_is_not_given_from_the_verifier(tiny):
    shape = HeadShape(kv_heads=4, intermediate_size=10).for_verifier("eagle", tiny)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate_size) == (4, 4, 8, 10)
    for kind, changes, rule in (
        ("eagle", {"layers": 2}, "layers must be 1, got 2"),
        ("medusa", {"heads": 2}, "has no decoder layer, heads cannot be set"),
        ("block", {"kv_heads": 3}, "heads must be a multiple of kv_heads = 3, got 4"),
    ):
        with pytest.raises(CalibrationError, match=rf"head '{kind}': .*{rule}"):
            HeadShape(**changes).for_verifier(kind, tiny)


def test_a_job_trains_its_heads_and_finds_them_again(tmp_path):
    save_tiny(tmp_path / "model")
    verifier = load_verifier(str(tmp_path / "model"), device="cpu", dtype="float32")
    for domain in ("chat", "code"):
        words = [f"{domain} {number} abc" for number in range(5)]
        prompts = [Prompt(f"{domain}-{number}", domain, word) for number, word in enumerate(words)]
        write_corpus(verifier, prompts, tmp_path / "corpus" / domain, max_new_tokens=12, batch_size=4)
    (tmp_path / "job.toml").write_text(
        'out = "heads"\n[verifier]\nname = "model"\ndevice = "cpu"\n[corpus]\nfolder = "corpus"\nheld_out = 1\n'
        "[training]\ntokens = 100\nbatch_tokens = 64\n"
        '[[head]]\nname = "m"\nkind = "medusa"\nshape = { tokens = 2 }\n'
        '[[head]]\nname = "e"\nkind = "eagle"\ntraining = { tokens = 150, regression = 0.1 }\n'
    )
    job, out = load_heads_job(tmp_path / "job.toml")
    assert out == tmp_path / "heads"
    stages = []
    folders = run_heads(job, out, lambda stage, done, total: stages.append(stage))
    assert folders == [out / "m", out / "e"]
    assert {"train m", "train e"} <= set(stages)
    recipe = read_about(out / "e")["recipe"]
    assert recipe["settings"]["tokens"] == 150
    assert recipe["settings"]["batch_tokens"] == 64
    assert (recipe["texts"], recipe["domains"]) == (8, ["chat", "code"])
    before = (out / "m" / "model.safetensors").stat().st_mtime_ns
    assert run_heads(job, out) == folders
    assert (out / "m" / "model.safetensors").stat().st_mtime_ns == before
    changed = job.model_copy(update={"training": job.training.model_copy(update={"tokens": 120})})
    with pytest.raises(CalibrationError, match=r"m: holds a head trained otherwise"):
        run_heads(changed, out)
    few = job.model_copy(update={"corpus": job.corpus.model_copy(update={"held_out": 5})})
    with pytest.raises(CalibrationError, match=r"must hold more than 5 texts of chat, got 5"):
        run_heads(few, out)


def test_a_job_tells_every_fault_with_its_place():
    head = {"name": "x", "kind": "eagle", "shape": {"layers": 2}}
    with pytest.raises(CalibrationError) as fault:
        parse_heads_job({"out": "o", "corpus": {"folder": "c"}, "head": [head, {"name": "x", "kind": "medusa"}]})
    assert "head[0].shape: head 'eagle': layers must be 1, got 2" in str(fault.value)
    assert "head[1].name: must be unique, got 'x'" in str(fault.value)
    with pytest.raises(CalibrationError) as fault:
        parse_heads_job({"out": "o", "corpus": {"foldr": "c"}, "head": [{"name": "x", "kind": "medussa"}]})
    assert "did you mean 'folder'?" in str(fault.value)
    assert "did you mean 'medusa'?" in str(fault.value)
    with pytest.raises(CalibrationError, match="on_policy"):
        parse_heads_job(
            {
                "out": "o",
                "corpus": {"folder": "c"},
                "training": {"on_policy": 0.5},
                "head": [{"name": "x", "kind": "eagle"}],
            }
        )


def test_the_recipes_can_be_read():
    files = sorted(RECIPES.glob("*.toml"))
    assert files
    for file in files:
        job, out = load_heads_job(file)
        assert {head.kind for head in job.head} == set(KINDS)
        assert out.parent == file.parent
        json.dumps([job.settings(head).model_dump() for head in job.head])
