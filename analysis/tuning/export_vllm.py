"""A setting as vLLM's ``--speculative-config``."""

from __future__ import annotations

import json
from typing import Any

from analysis.tuning.engine_schemas import VllmSpeculativeConfig
from analysis.tuning.engine_setting import Setting, Words
from calibration.traces.paradigms import EAGLE, EAGLE3, LOOKUP, MEDUSA, MODEL, SUFFIX

SOURCE = "vllm/config/speculative.py at 002e77c; docs/features/speculative_decoding/dynamic_speculative_decoding.md"
METHODS = {
    LOOKUP: "ngram",
    SUFFIX: "suffix",
    EAGLE: "eagle",
    EAGLE3: "eagle3",
    MODEL: "draft_model",
    MEDUSA: "medusa",
}


def vllm(setting: Setting) -> Words:
    """Give the JSON of `setting`; `ExportError` where vLLM has no words for it."""
    if setting.off:
        return Words(None, "", (), ("leave --speculative-config out: nothing is drafted",))
    family = setting.family("vLLM", METHODS)
    longest, table = setting.lengths("vLLM")
    config: dict[str, Any] = {"method": METHODS[family]}
    if (model := setting.model(family)) is not None:
        config["model"] = model
    config["num_speculative_tokens"] = longest
    notes = []
    if table is not None:
        config["num_speculative_tokens_per_batch_size"] = table
        if family not in (EAGLE, EAGLE3):
            notes.append("vLLM documents its schedule by batch size as tested with EAGLE, EAGLE-3 and DFlash")
    if family == LOOKUP:
        told = setting.drafters[0].settings
        sizes = {"prompt_lookup_max": told.get("ngram_max"), "prompt_lookup_min": told.get("ngram_min")}
        config |= {key: value for key, value in sizes.items() if value is not None}
    VllmSpeculativeConfig.model_validate(config)
    text = json.dumps(config)
    return Words("vllm.json", text + "\n", ("--speculative-config", text), tuple(notes))
