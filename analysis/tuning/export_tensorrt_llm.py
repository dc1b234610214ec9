"""A setting as ``speculative_config`` of TensorRT-LLM's LLM API, in YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from analysis.tuning.engine_schemas import TensorrtOptions
from analysis.tuning.engine_setting import Setting, Words
from calibration.common.errors import ExportError
from calibration.traces.paradigms import EAGLE3, LOOKUP, MODEL

SOURCE = "tensorrt_llm/llmapi/llm_args.py (DecodingBaseConfig and its subclasses); LLM API reference 1.4.0rc1"
TYPES = {LOOKUP: "NGram", EAGLE3: "Eagle3", MODEL: "Draft_Target"}
FILE = "tensorrt-llm.yaml"


def tensorrt_llm(setting: Setting) -> Words:
    """Give the YAML of `setting`; `ExportError` where TensorRT-LLM has no words for it."""
    if setting.off:
        return Words(None, "", (), ("leave speculative_config out: nothing is drafted",))
    family = setting.family("TensorRT-LLM", TYPES)
    longest, table = setting.lengths("TensorRT-LLM")
    config: dict[str, Any] = {"decoding_type": TYPES[family], "max_draft_len": longest}
    if (model := setting.model(family)) is not None:
        config["speculative_model"] = model
    if family == LOOKUP and (size := setting.drafters[0].settings.get("ngram_max")) is not None:
        config["max_matching_ngram_size"] = size
    notes = []
    if table is not None:
        config["draft_len_schedule"] = _schedule(table)
        notes.append(
            "draft_len_schedule as releases from 1.3 on read it: keys are the largest batch of each length; before, "
            "they were the smallest"
        )
    TensorrtOptions.model_validate({"speculative_config": config})
    text = _yaml({"speculative_config": config})
    return Words(FILE, text, ("--extra_llm_api_options", FILE), tuple(notes))


def _schedule(table: list[list[int]]) -> dict[int, int]:
    """Give the largest batch of each length; above the last one nothing is drafted anyway."""
    lengths = [row[2] for row in table]
    if lengths[0] != max(lengths):
        raise ExportError(
            "TensorRT-LLM needs the longest draft at the smallest batches in draft_len_schedule; "
            f"this table begins with {lengths[0]} and goes up to {max(lengths)}"
        )
    schedule = {last: tokens for _, last, tokens in table}
    while schedule[max(schedule)] == 0:
        del schedule[max(schedule)]
    return schedule


def _yaml(table: Mapping[Any, Any], indent: str = "") -> str:
    """Give `table`, maps of maps, texts and whole numbers, as YAML; a text in quotes as JSON has it is YAML too."""
    lines = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}:\n{_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
    return "".join(lines)
