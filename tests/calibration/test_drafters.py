"""Drafters cut from a verifier: their names, their shared weights, and what they compute."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import random_prompts, tiny_llama, tiny_verifier

from calibration.common.errors import CalibrationError
from calibration.drafters import EarlyExit, LayerSkip, PromptLookup, build_drafter, kept_layers, parse_drafter
from calibration.models.load import check_architecture

MODELS = ("exit-1", "exit-3", "skip-1-3", "skip-0-1", "skip-3-4")


@pytest.mark.parametrize("name", ["prompt-lookup", *MODELS])
def test_names_read_back_as_they_are_written(name):
    assert parse_drafter(name).label == name


def test_kinds_of_drafters():
    assert parse_drafter("prompt-lookup") == PromptLookup(ngram_max=3, ngram_min=1, max_draft_tokens=20)
    assert parse_drafter("exit-16") == EarlyExit(layers=16)
    assert parse_drafter("skip-13-17") == LayerSkip(first=13, stop=17)
    assert kept_layers(LayerSkip(first=1, stop=3), 5) == (0, 3, 4)
    assert kept_layers(EarlyExit(layers=2), 5) == (0, 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("promt-lookup", "did you mean 'prompt-lookup'"),
        ("exit", "must be prompt-lookup, exit-L or skip-A-B"),
        ("exit--3", "must be"),
    ],
)
def test_unknown_drafters_are_refused(name, words):
    with pytest.raises(CalibrationError, match=words):
        parse_drafter(name)


@pytest.mark.parametrize("name", ["exit-0", "exit-4", "exit-9", "skip-2-2", "skip-3-2", "skip-0-4", "skip-2-5"])
def test_drafters_that_do_not_fit_four_layers_are_refused(tiny, name):
    with pytest.raises(CalibrationError, match=f"drafter '{name}'"):
        build_drafter(parse_drafter(name), tiny)


@pytest.mark.parametrize("name", MODELS)
def test_model_drafters_share_every_weight(tiny, name):
    spec = parse_drafter(name)
    drafter = build_drafter(spec, tiny)
    owned = {p.data_ptr() for p in tiny.model.parameters()}
    assert {p.data_ptr() for p in drafter.model.parameters()} <= owned
    for new, old in enumerate(kept_layers(spec, 4)):
        mine, its = drafter.model.model.layers[new].mlp.up_proj, tiny.model.model.layers[old].mlp.up_proj
        assert mine.weight.data_ptr() == its.weight.data_ptr()
        assert drafter.model.model.layers[new].self_attn.layer_idx == new


@pytest.mark.parametrize("name", MODELS)
def test_a_drafter_computes_what_a_verifier_without_those_layers_would(tiny, name):
    """The reference deletes layers from a deep copy and runs it without a cache."""
    keep = kept_layers(parse_drafter(name), 4)
    reference = copy.deepcopy(tiny.model)
    reference.model.layers = torch.nn.ModuleList([reference.model.layers[i] for i in keep])
    reference.config.num_hidden_layers = len(keep)
    tokens = torch.tensor(random_prompts(0, 2, 9, 9))
    wanted = reference(input_ids=tokens, use_cache=False).logits
    got = build_drafter(parse_drafter(name), tiny).model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(got, wanted)


def test_early_exit_reads_the_hidden_state_behind_its_layer(tiny):
    tokens = torch.tensor(random_prompts(0, 1, 9, 9))
    hidden = tiny.model(input_ids=tokens, output_hidden_states=True).hidden_states[2]
    wanted = tiny.model.lm_head(tiny.model.model.norm(hidden))
    got = build_drafter(EarlyExit(layers=2), tiny).model(input_ids=tokens).logits
    torch.testing.assert_close(got, wanted)


def test_parameter_counts_are_those_of_the_formula(tiny):
    # Attention: q and o 32 x 32, k and v 32 x 16; MLP 3 x 32 x 48; two norms of 32.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    embedding = 97 * 32  # tied: counted once
    info = tiny.info
    assert (info.layers, info.hidden_size, info.heads, info.kv_heads, info.vocabulary) == (4, 32, 4, 2, 97)
    assert info.parameters_non_embedding == 4 * layer + 32
    assert info.parameters == 4 * layer + 32 + embedding
    skip = build_drafter(LayerSkip(first=1, stop=3), tiny).info
    assert skip.parameters_non_embedding == 2 * layer + 32
    assert skip.parameters == 2 * layer + 32 + embedding
    assert (skip.paradigm, skip.layers, skip.deterministic) == ("layer-skip", 2, False)
    lookup = build_drafter(PromptLookup(), tiny).info
    assert (lookup.parameters, lookup.deterministic, lookup.max_draft_tokens) == (0, True, 20)
    assert lookup.settings == {"ngram_max": 3, "ngram_min": 1, "match": "earliest"}


def test_sliding_windows_and_foreign_shapes_are_refused():
    windowed = tiny_llama()
    windowed.config.sliding_window = 16
    with pytest.raises(CalibrationError, match="full attention, got sliding_window = 16"):
        check_architecture("windowed", windowed)
    with pytest.raises(CalibrationError, match=r"must have model\.layers .*got Linear"):
        check_architecture("linear", torch.nn.Linear(2, 2))


def test_untied_heads_are_shared_too():
    verifier = tiny_verifier(0)
    model = verifier.model
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone() + 1.0, requires_grad=False)
    drafter = build_drafter(EarlyExit(layers=2), verifier)
    assert drafter.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert drafter.model.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
