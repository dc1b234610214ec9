"""Students, Kangaroo's adapter and nested exits: sizes, folders, and drafts against plain passes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from replayed import GREEDY, SAMPLED, live, recorded, rows_of, same_rounds, written
from tiny import random_prompts, tiny_verifier

from calibration.common.errors import CalibrationError
from calibration.drafters import Distilled, Kangaroo, NestedExits, build_drafter, submodel
from calibration.models.sampling import distribution, generator_for
from calibration.trained.folder import save_drafter
from calibration.trained.kangaroo import adapter_tensors, build_kangaroo
from calibration.trained.shapes import AnyShape, KangarooShape, NestedShape, StudentShape
from calibration.trained.students import build_student, load_student, own_tensors, parameters
from calibration.trained.trainees import load_trained, make_trainee

SHAPES = {
    "fresh": StudentShape(layers=2, heads=2, kv_heads=1, intermediate_size=24),
    "copied": StudentShape(from_layers=(0, 1, 3)),
    "nested": NestedShape(from_layers=(0, 1, 2, 3), exits=(1, 3)),
    "kangaroo": KangarooShape(exit_layer=3),
}


@pytest.fixture(scope="module")
def verifier():
    return tiny_verifier(1, layers=5)


@pytest.fixture(scope="module")
def folders(verifier, tmp_path_factory):
    """Untrained drafters of every shape, written as training writes them."""
    root = tmp_path_factory.mktemp("drafters")
    for name, shape in SHAPES.items():
        made = make_trainee(verifier, shape, generator_for(verifier.device, 0), torch.float64)
        with torch.no_grad():  # untrained norms are small: at full size drafts are surer and agree more often
            made.model.model.norm.weight.copy_(verifier.model.model.norm.weight)
        settings = {"shape": shape.model_dump(exclude_none=True)}
        save_drafter(root / name, made.kind, settings, verifier.info, made.weights, {"seed": 0})
    return root


def made(verifier, folders, name):
    path = str(folders / name)
    settings = {
        "fresh": Distilled(path=path),
        "copied": Distilled(path=path),
        "nested": NestedExits(path=path, thresholds=(0.6, 0.5)),
        "kangaroo": Kangaroo(path=path, confidence=0.3, tokens=5),
        "untrained": NestedExits(exits=(1, 3, 4), thresholds=(0.6, 0.5)),
    }
    return build_drafter(settings[name], verifier)


ALL = [*SHAPES, "untrained"]


def test_sizes_are_counted_from_the_shape(verifier):
    hidden, vocabulary = 32, 97
    shape = StudentShape(layers=3, heads=6, kv_heads=2, head_dim=4, intermediate_size=20)
    layer = hidden * 4 * (6 + 2 + 2) + 6 * 4 * hidden + 3 * hidden * 20 + 2 * hidden
    assert parameters(verifier, shape) == 3 * layer + hidden
    student = build_student(verifier, shape, generator_for(verifier.device, 0), torch.float64)
    assert sum(t.numel() for t in own_tensors(student).values()) == 3 * layer + hidden
    assert sum(p.numel() for p in student.parameters()) == 3 * layer + hidden + hidden * vocabulary
    whole = StudentShape(from_layers=tuple(range(5)))
    assert parameters(verifier, whole) == verifier.info.parameters_non_embedding
    assert parameters(verifier, StudentShape(layers=5)) == verifier.info.parameters_non_embedding


def test_a_family_from_under_a_percent_to_a_fifth_fits_a_real_shape():
    """SmolLM2-135M's shape on the meta device: nothing is allocated."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from calibration.models.load import Verifier, describe

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    big = Verifier(describe("big", model), model, None, frozenset())
    assert big.info.parameters_non_embedding == 106_203_456
    wanted = {
        0.007: StudentShape(layers=1, heads=3, kv_heads=1, intermediate_size=256),
        0.016: StudentShape(layers=1, heads=6, kv_heads=2, intermediate_size=640),
        0.033: StudentShape(from_layers=(29,)),
        0.067: StudentShape(from_layers=(0, 29)),
        0.100: StudentShape(from_layers=(0, 1, 29)),
        0.200: StudentShape(from_layers=(0, 1, 2, 15, 28, 29)),
    }
    for share, shape in wanted.items():
        assert parameters(big, shape) / 106_203_456 == pytest.approx(share, abs=5e-4)


def test_a_copied_student_begins_as_those_layers(verifier):
    keep = (0, 2, 3)
    student = build_student(
        verifier, StudentShape(from_layers=keep), generator_for(verifier.device, 0), torch.float64
    )
    cut = submodel(verifier.model, keep)
    ids = torch.tensor([random_prompts(0, 1, 9, 9)[0]])
    with torch.no_grad():
        student.model.norm.weight.copy_(verifier.model.model.norm.weight)
        assert torch.allclose(student(input_ids=ids).logits, cut(input_ids=ids).logits, atol=1e-6)
        student.model.layers[0].mlp.up_proj.weight.add_(1.0)
    assert not torch.equal(
        student.model.layers[0].mlp.up_proj.weight, verifier.model.model.layers[0].mlp.up_proj.weight
    )


def test_a_student_shares_embedding_and_head_and_repeats_with_its_seed(verifier):
    shape = SHAPES["fresh"]
    one, two, other = (
        build_student(verifier, shape, generator_for(verifier.device, seed), torch.float64) for seed in (0, 0, 1)
    )
    assert one.get_input_embeddings().weight is verifier.model.get_input_embeddings().weight
    assert one.get_output_embeddings().weight is verifier.model.get_output_embeddings().weight
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(own_tensors(one)[key], own_tensors(two)[key])
    assert not torch.equal(own_tensors(one)[key], own_tensors(other)[key])
    assert not [name for name in own_tensors(one) if "embed" in name or "lm_head" in name]


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_gives_back_the_same_model_and_holds_only_its_own_tensors(verifier, folders, name):
    from safetensors import safe_open

    model, tensors = load_trained(folders / name, verifier)
    again, _ = load_trained(folders / name, verifier)
    ids = torch.tensor([random_prompts(0, 1, 9, 9)[0]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    with safe_open(folders / name / "model.safetensors", "pt") as file:
        kept = set(file.keys())
    assert kept == set(tensors)
    if name == "kangaroo":
        assert all(key.startswith(("model.layers.3.self_attn", "model.layers.3.input", "model.norm")) for key in kept)
        assert model.model.layers[0] is verifier.model.model.layers[0]


def test_kangaroo_is_its_equations(verifier):
    """h_L of the verifier, then h + attention(norm(h)), then norm and head; no MLP."""
    model = build_kangaroo(verifier, KangarooShape(exit_layer=2), torch.float64)
    ids = torch.tensor([random_prompts(3, 1, 9, 9)[0]])
    body = verifier.model.model
    with torch.no_grad():
        seen = {}
        handle = body.layers[1].register_forward_hook(
            lambda m, i, o: seen.update(h=o[0] if isinstance(o, tuple) else o)
        )
        verifier.model(input_ids=ids, use_cache=False)
        handle.remove()
        hidden, adapter = seen["h"], model.model.layers[2]
        places = torch.arange(9)[None]
        turned = body.rotary_emb(hidden, places)
        mask = torch.full((9, 9), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]
        update = adapter.self_attn(
            hidden_states=adapter.input_layernorm(hidden), position_embeddings=turned, attention_mask=mask
        )[0]
        wanted = verifier.model.lm_head(model.model.norm(hidden + update))
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, wanted, atol=1e-6)
    assert sum(t.numel() for t in adapter_tensors(model).values()) == 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32


@pytest.mark.parametrize("name", ALL)
def test_greedy_rounds_are_those_of_the_replay(verifier, folders, name):
    accepted = same_rounds(verifier, made(verifier, folders, name))
    assert accepted > 0 or name == "fresh"


@pytest.mark.parametrize("name", ["nested", "untrained"])
def test_nested_drafts_leave_at_the_first_sure_exit(verifier, folders, name):
    """One start at a time, no cache, one model per exit."""
    drafter = made(verifier, folders, name)
    if name == "untrained":
        models = [submodel(verifier.model, tuple(range(n))) for n in (1, 3, 4)]
    else:
        whole, _ = load_trained(folders / "nested", verifier)
        models = [submodel(whole, tuple(range(n))) for n in (1, 3, 4)]
    prompts = random_prompts(11, 3)
    outputs = written(verifier, GREEDY, prompts, 14)
    trace = recorded(verifier, [drafter], prompts, outputs, GREEDY, gamma_max=4, stride=1)
    used = set()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        got = rows_of(trace.positions, f"r{row}", drafter.name)
        free = rows_of(trace.rollouts, f"r{row}", drafter.name)
        for t in range(len(output.ids)):
            text, layers, run, sure = [*prompt, *output.ids[:t]], [], 0, []
            for j in range(4):
                ids = torch.tensor([text])
                with torch.no_grad():
                    logits = [m(input_ids=ids, use_cache=False).logits[0, -1] for m in models]
                tops = [float(part.softmax(-1).max()) for part in logits]
                pick = 0 if tops[0] >= 0.6 else 1 if tops[1] >= 0.5 else 2
                layers.append((1, 3, 4)[pick])
                sure.append(tops[pick])
                text.append(int(logits[pick].argmax()))
                run += run == j and t + j < len(output.ids) and text[-1] == output.ids[t + j]
            assert got["draft_layers"][t] == np.cumsum(layers).tolist()
            assert got["run_length"][t] == run
            mine = [c for p, c in zip(free["position"], free["drafter_confidence"], strict=True) if p == t]
            assert mine == pytest.approx(sure, abs=1e-5)
            used |= set(layers)
    assert used == {1, 3, 4}


@pytest.mark.parametrize("name", ["copied", "nested", "untrained", "kangaroo"])
def test_sampled_acceptance_given_the_live_text(verifier, folders, name):
    """First drafts of live rounds: accepted with min(1, q/p), summed against its own variance."""
    drafter = made(verifier, folders, name)
    prompts = random_prompts(2, 50)
    runs = live(verifier, drafter, prompts, 3, SAMPLED, 40)
    trace = recorded(verifier, [drafter], prompts, runs, SAMPLED, gamma_max=3)
    total = np.zeros(3)
    for row, run in enumerate(runs):
        got = rows_of(trace.positions, f"r{row}", drafter.name)
        for r in run.rounds:
            if r.drafted:
                a = got["accept_probability"][r.start]
                total += (r.accepted > 0) - a, a * (1 - a), 1
    assert total[2] > 300
    assert abs(total[0]) < 3.5 * np.sqrt(total[1])


def test_sampled_nested_columns_are_those_of_plain_distributions(verifier, folders):
    drafter = made(verifier, folders, "untrained")
    prompts = random_prompts(4, 2)
    outputs = written(verifier, SAMPLED, prompts, 12)
    trace = recorded(verifier, [drafter], prompts, outputs, SAMPLED, gamma_max=3)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        got = rows_of(trace.positions, f"r{row}", drafter.name)
        for t, token in enumerate(output.ids):
            ids = torch.tensor([[*prompt, *output.ids[:t]]])
            with torch.no_grad():
                q_logits = drafter.model(input_ids=ids, use_cache=False).logits[0, -1]
                p_logits = verifier.model(input_ids=ids, use_cache=False).logits[0, -1]
            p, q = (distribution(part, 0.8, 0.9) for part in (p_logits, q_logits))
            assert got["accept_probability"][t] == pytest.approx(min(1.0, float(q[token] / p[token])), abs=1e-4)
            assert got["overlap"][t] == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-4)
            assert got["emitted_rank"][t] == int((q_logits > q_logits[token]).sum())


def test_kangaroo_stops_where_it_is_not_sure(verifier, folders):
    prompts = random_prompts(11, 4)
    outputs = written(verifier, GREEDY, prompts, 20)
    lengths = {}
    for confidence in (0.0, 0.3, 1.0):
        drafter = build_drafter(Kangaroo(path=str(folders / "kangaroo"), confidence=confidence, tokens=5), verifier)
        trace = recorded(verifier, [drafter], prompts, outputs, GREEDY)
        lengths[confidence] = trace.positions["proposal_length"]
        assert drafter.info.max_draft_tokens == 5
    assert set(lengths[0.0]) == {5}
    assert set(lengths[1.0]) == {0}
    assert 0 < np.mean(lengths[0.3]) < 5


def test_the_manifest_tells_shape_and_recipe_but_no_path(verifier, folders):
    info = made(verifier, folders, "nested").info
    assert info.paradigm == "nested-exits"
    assert info.settings["shape"]["exits"] == [1, 3]
    assert info.settings["thresholds"] == [0.6, 0.5]
    assert info.settings["recipe"] == {"seed": 0}
    assert str(folders) not in json.dumps(info.model_dump())
    assert made(verifier, folders, "copied").info.name == "copied"


@pytest.mark.parametrize(
    ("table", "rule"),
    [
        ({}, "one of from_layers and layers"),
        ({"layers": 1, "from_layers": [0]}, "one of from_layers and layers"),
        ({"from_layers": [0], "heads": 3}, "heads cannot be set"),
        ({"from_layers": [0, 0]}, "no layer twice"),
        ({"layers": 1, "heads": 3, "kv_heads": 2}, "multiple of kv_heads = 2, got 3"),
        ({"kind": "nested", "layers": 3, "exits": [2, 3]}, "below the 3 layers"),
        ({"kind": "nested", "layers": 3, "exits": [2, 1]}, "exits must rise"),
        ({"kind": "kangaroo"}, "Field required"),
        ({"layers": 1, "depth": 2}, "Extra inputs"),
    ],
)
def test_shapes_that_make_no_student_are_refused(table, rule):
    with pytest.raises(ValidationError, match=rule):
        TypeAdapter(AnyShape).validate_python(table)


def test_shapes_that_do_not_fit_the_verifier_are_refused(verifier):
    generator = generator_for(verifier.device, 0)
    with pytest.raises(CalibrationError, match=r"from_layers must lie in \[0, 4\], got \[1, 7\]"):
        build_student(verifier, StudentShape(from_layers=(1, 7)), generator, torch.float64)
    with pytest.raises(CalibrationError, match="multiple of kv_heads = 2, got 3"):
        build_student(verifier, StudentShape(layers=1, heads=3), generator, torch.float64)
    with pytest.raises(CalibrationError, match=r"exit_layer must lie in \[1, 4\], got 5"):
        build_kangaroo(verifier, KangarooShape(exit_layer=5), torch.float64)
    with pytest.raises(CalibrationError, match=r"exits must lie in \[1, 4\], got 5"):
        build_drafter(NestedExits(exits=(1, 5), thresholds=(0.5,)), verifier)


def test_folders_that_do_not_fit_are_refused(verifier, folders):
    with pytest.raises(CalibrationError, match="must hold a drafter of kind 'distilled', got 'kangaroo'"):
        build_drafter(Distilled(path=str(folders / "kangaroo")), verifier)
    with pytest.raises(CalibrationError, match="thresholds must be 2, one for each exit but the last, got 1"):
        build_drafter(NestedExits(path=str(folders / "nested"), thresholds=(0.5,)), verifier)
    with pytest.raises(CalibrationError, match="with layers = 5, got 3"):
        build_drafter(Distilled(path=str(folders / "copied")), tiny_verifier(1, layers=3))
    student = build_student(verifier, SHAPES["copied"], generator_for(verifier.device, 0), torch.float64)
    tensors = own_tensors(student)
    with pytest.raises(CalibrationError, match=r"got another 'model\.norm\.weight'"):
        load_student(verifier, SHAPES["copied"], {k: t for k, t in tensors.items() if k != "model.norm.weight"})
    with pytest.raises(ValidationError, match="one of exits and path"):
        NestedExits(thresholds=(0.5,))
    with pytest.raises(ValidationError, match="thresholds must be 1"):
        NestedExits(exits=(1, 2), thresholds=(0.5, 0.4))
    with pytest.raises(ValidationError, match="exits must rise"):
        NestedExits(exits=(2, 1), thresholds=(0.5,))
