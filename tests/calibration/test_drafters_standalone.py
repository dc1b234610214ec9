"""Standalone drafters: loading, the check of vocabularies, padded sizes, replay against the live loop."""

from __future__ import annotations

import pytest
import torch
from replayed import SAMPLED, live, recorded, rows_of, same_rounds
from tiny import random_prompts, save_tiny, tiny_llama, tiny_tokenizer, tiny_verifier
from tokens import byte_tokenizer

from calibration.common.errors import CalibrationError
from calibration.common.vocabularies import first_difference
from calibration.drafters import Standalone, build_drafter
from calibration.drafters.standalone import check_attention, resized, standalone_drafter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A drafter that often agrees with the verifier: its weights with a little noise."""
    path = tmp_path_factory.mktemp("drafter")
    save_tiny(path, 1)
    return path


def noisy(seed, spread, vocabulary=97):
    model = tiny_llama(1, vocabulary=vocabulary)
    noise = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight += spread * torch.randn(weight.shape, generator=noise)
    return model


def settings(**changed):
    return Standalone(model="noisy", **changed)


def test_a_folder_is_loaded_in_the_verifiers_dtype(tiny, folder):
    drafter = build_drafter(Standalone(model=str(folder)), tiny)
    assert drafter.model.dtype == torch.float64
    assert drafter.name == folder.name
    assert (drafter.info.paradigm, drafter.info.deterministic) == ("standalone", False)
    assert drafter.info.parameters == tiny.info.parameters
    tokens = torch.tensor(random_prompts(0, 1, 9, 9))
    wanted = tiny_llama(1, dtype="float32")(input_ids=tokens).logits
    torch.testing.assert_close(drafter.model(input_ids=tokens).logits.float(), wanted, atol=1e-4, rtol=1e-4)
    assert build_drafter(Standalone(model=str(folder), dtype="float32"), tiny).model.dtype == torch.float32


def test_a_folder_beside_the_job_file_is_found_there(folder):
    assert Standalone(model=folder.name).placed(folder.parent).model == str(folder)
    assert Standalone(model="some/model").placed(folder.parent).model == "some/model"


def test_live_rounds_are_those_of_the_replay(tiny):
    drafter = standalone_drafter(settings(), noisy(0, 0.03), tiny_tokenizer(), tiny)
    assert same_rounds(tiny, drafter) > 20


@pytest.mark.parametrize("size", [90, 120])
def test_vocabularies_padded_to_other_sizes_are_made_equal(tiny, size):
    """The verifier has 97 rows; its tokenizer 71 tokens, so that rows behind them are padding."""
    model = noisy(0, 0.03, size)
    drafter = standalone_drafter(settings(), model, tiny_tokenizer(), tiny)
    tokens = torch.tensor(random_prompts(0, 2, 9, 9, vocabulary=71))
    plain, fitted = model(input_ids=tokens).logits, drafter.model(input_ids=tokens).logits
    assert fitted.shape[-1] == 97
    shared = min(size, 97)
    torch.testing.assert_close(fitted[..., :shared], plain[..., :shared])
    assert (fitted[..., shared:] == -torch.inf).all()
    assert model(input_ids=tokens).logits.shape[-1] == size  # the model itself is as it was
    assert drafter.model.lm_head.head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_a_padded_drafter_drafts_and_is_recorded_in_sampled_decoding(tiny):
    drafter = standalone_drafter(settings(), noisy(0, 0.03, 120), tiny_tokenizer(), tiny)
    prompts = random_prompts(2, 4)
    runs = live(tiny, drafter, prompts, 3, SAMPLED, 12)
    recording = recorded(tiny, [drafter], prompts, runs, SAMPLED)
    accept = rows_of(recording.positions, "r0", "noisy")["accept_probability"]
    assert all(0 <= a <= 1 for a in accept)
    assert max(accept) > 0


def test_equal_sizes_need_no_new_head(tiny):
    model = tiny_llama(3)
    assert resized(model, 97) is model


def test_another_vocabulary_is_refused_and_the_kind_for_it_named(tiny):
    with pytest.raises(
        CalibrationError, match=r"drafter 'noisy': must have the tokens .* token 4 is .*kind 'foreign'"
    ):
        standalone_drafter(settings(), tiny_llama(3, vocabulary=300), byte_tokenizer(300), tiny)
    with pytest.raises(CalibrationError, match="it reads 50 tokens, the verifier has 71"):
        standalone_drafter(settings(), tiny_llama(3, vocabulary=50), tiny_tokenizer(), tiny)


def test_special_tokens_may_have_other_names():
    mine, other = tiny_tokenizer(), byte_tokenizer(300)
    assert first_difference(mine, tiny_tokenizer()) is None
    assert first_difference(mine, tiny_tokenizer(60)) is None  # fewer at the end
    renamed = byte_tokenizer(300, ("<stop>",))
    assert first_difference(other, renamed) is None
    assert first_difference(byte_tokenizer(300, ("<a>", "<b>")), other).startswith("token 2 is")


def test_models_whose_attention_cannot_be_masked_are_refused():
    model = tiny_llama(3)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(CalibrationError, match="every layer must be full attention, got full_attention, sliding"):
        check_attention("d", model)
    strange = type("Strange", (), {"config": tiny_llama(3).config, "forward": lambda self, input_ids: None})()
    with pytest.raises(
        CalibrationError, match="must take attention_mask, past_key_values, position_ids, which Strange"
    ):
        check_attention("d", strange)


def test_what_cannot_be_loaded_is_refused(tiny, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CalibrationError, match=r"drafter 'mine': model must be a folder or a hub name"):
        Standalone(name="mine", model=str(tmp_path)).build(tiny)


def test_a_drafter_for_another_verifier_keeps_its_own_settings(folder):
    other = tiny_verifier(4)
    drafter = Standalone(model=str(folder)).build(other)
    assert drafter.info.settings == {"model": str(folder)}
