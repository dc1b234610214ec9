"""Loading verifiers by name, and refusing what cannot be loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny import save_tiny, tiny_llama

from calibration.common.errors import CalibrationError, MissingExtraError, require
from calibration.drafters import submodel
from calibration.models.load import choose_device, choose_dtype, describe, load_verifier, make_verifier


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
        "import calibration, calibration.models.load, calibration.common.fetch, calibration.drafters\n"
        "from calibration.jobs.job import CalibrationSettings, calibrate\n"
        "from calibration.common.errors import MissingExtraError\n"
        "try: calibrate(CalibrationSettings(), sys.argv[1])\n"
        "except MissingExtraError as fault: print(fault)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "torch: not installed; pip install 'paceline[calibration]' brings it"
    assert list(tmp_path.iterdir()) == []


def test_rounding_to_fp8_keeps_the_text_nearly(monkeypatch):
    """The decoder layers' maps are rounded, with outliers in their inputs; the rest stays as it is."""
    from calibration.models.fp8 import Fp8Module

    model = tiny_llama(3, spread=0.2, dtype="bfloat16")
    tokens = torch.arange(3, 40)[None]
    before = model(input_ids=tokens).logits.float()
    weights = sum(p.numel() for p in model.parameters())
    Fp8Module.put_in_place(model.model.layers)
    after = model(input_ids=tokens).logits.float()
    assert (before - after).norm() < 0.3 * before.norm()  # e4m3 has 3 bits of mantissa, four layers add up
    assert not torch.equal(before, after)
    info = describe("tiny", model)
    assert (info.dtype, info.parameters) == ("float8_e4m3fn", weights)
    cut = submodel(model, (0, 2))
    assert cut(input_ids=tokens).logits.isfinite().all()


def test_fp8_inputs_are_scaled_call_by_call():
    """An outlier of 1,000, which real activations have, is not clipped."""
    from calibration.models.fp8 import Fp8Module

    linear = torch.nn.Linear(64, 32, bias=True, dtype=torch.bfloat16)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()
    x[:, 7] = 1000.0
    wanted = linear(x).float()
    assert (Fp8Module(linear)(x).float() - wanted).norm() < 0.05 * wanted.norm()


def test_fp8_is_refused_where_the_device_cannot_run_it(tmp_path):
    save_tiny(tmp_path / "tiny")
    with pytest.raises(CalibrationError, match=r"verifier 'tiny': fp8 needs a CUDA device"):
        load_verifier(str(tmp_path / "tiny"), device="cpu", dtype="fp8")


def test_a_model_with_accelerate_hooks_can_be_cut(tiny):
    """As device_map leaves it: hooks that move inputs are bound to their module, so a cut needs hooks of its own."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    tokens = torch.arange(3, 20)[None]
    plain = submodel(tiny_llama(5), (1, 3))(input_ids=tokens).logits
    hooked = tiny_llama(5)
    for module in (hooked.model.embed_tokens, *hooked.model.layers, hooked.model.norm, hooked.lm_head):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    whole = hooked(input_ids=tokens).logits
    cut = submodel(hooked, (1, 3))
    assert torch.equal(cut(input_ids=tokens).logits, plain)
    assert torch.equal(hooked(input_ids=tokens).logits, whole)


def test_device_map_spreads_the_verifier(tmp_path):
    save_tiny(tmp_path / "tiny")
    mapped = load_verifier(str(tmp_path / "tiny"), dtype="float32", device_map="cpu")
    plain = load_verifier(str(tmp_path / "tiny"), dtype="float32", device="cpu")
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(mapped.model(input_ids=tokens).logits, plain.model(input_ids=tokens).logits)
