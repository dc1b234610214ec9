"""Loading verifiers by name, and refusing what cannot be loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny import save_tiny, tiny_llama

from calibration.errors import CalibrationError, MissingExtraError
from calibration.extras import require
from calibration.models import choose_device, choose_dtype, load_verifier, make_verifier


def test_a_local_folder_is_loaded_under_its_own_name(tmp_path):
    folder = save_tiny(tmp_path / "my-model")
    verifier = load_verifier(str(folder), device="cpu")
    assert verifier.info.name == "my-model"
    assert verifier.info.dtype == "float32"
    assert verifier.end_ids == {2}
    assert verifier.provenance is None
    assert not any(p.requires_grad for p in verifier.model.parameters())
    half = load_verifier(str(folder), device="cpu", dtype="bfloat16")
    assert half.info.dtype == "bfloat16"


def test_prompts_go_through_the_chat_template_or_stay_plain(tiny):
    user, start = tiny.tokenizer.convert_tokens_to_ids(["<user>", "<start>"])
    plain = tiny.tokenizer("Hi", add_special_tokens=False).input_ids
    assert tiny.encode("Hi") == [user, *plain, start]
    bare = make_verifier("bare", tiny.model, type(tiny.tokenizer)(tokenizer_object=tiny.tokenizer._tokenizer))
    assert bare.encode("Hi") == plain


def test_end_tokens_come_from_model_and_tokenizer(tiny):
    model = tiny_llama(0)
    model.generation_config.eos_token_id = [7, 9]
    assert make_verifier("x", model, tiny.tokenizer).end_ids == {2, 7, 9}


def test_unknown_names_are_refused_with_the_nearest_one(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"verifier 'smollm-135m'.*did you mean 'smollm2-135m'"):
        load_verifier("smollm-135m", device="cpu")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match=f"verifier '{tmp_path.name}': must be"):
        load_verifier(str(tmp_path), device="cpu")


def test_damaged_weights_are_refused(tmp_path):
    folder = save_tiny(tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CalibrationError, match="verifier 'damaged': must be"):
        load_verifier(str(folder), device="cpu")


def test_devices_and_dtypes():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(CalibrationError, match="dtype: not known, got 'float23'; did you mean 'float32'"):
        choose_dtype("float23", torch.device("cpu"))
    with pytest.raises(CalibrationError, match="device: not known, got 'cudo'; did you mean 'cuda'"):
        choose_device("cudo")


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(CalibrationError, match="must be available, got 'cuda'"):
        choose_device("cuda")


def test_a_missing_module_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingExtraError, match=r"transformers: not installed; pip install 'paceline\[calibration\]'"
    ):
        require("transformers")


def test_jobs_can_be_described_without_torch_and_say_what_is_missing(tmp_path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import calibration, calibration.models, calibration.fetch, calibration.drafters\n"
        "from calibration.job import CalibrationSettings, calibrate\n"
        "from calibration.errors import MissingExtraError\n"
        "try: calibrate(CalibrationSettings(), sys.argv[1])\n"
        "except MissingExtraError as fault: print(fault)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "torch: not installed; pip install 'paceline[calibration]' brings it"
    assert list(tmp_path.iterdir()) == []
