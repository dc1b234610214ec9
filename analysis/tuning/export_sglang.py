"""A setting as SGLang's options, and its file of adaptive steps where the length depends on the batch."""

from __future__ import annotations

import json
from typing import Any

from analysis.tuning.engine_schemas import SglangAdaptiveConfig, SglangArguments
from analysis.tuning.engine_setting import Setting, Words
from calibration.common.errors import ExportError
from calibration.traces.paradigms import EAGLE, EAGLE3, LOOKUP, MODEL

SOURCE = (
    "python/sglang/srt/server_args.py; docs/advanced_features/speculative_decoding.md at 067ad4d; "
    "python/sglang/srt/speculative/adaptive_spec_params.py at 015c872"
)
ALGORITHMS = {LOOKUP: "NGRAM", EAGLE: "EAGLE", EAGLE3: "EAGLE3", MODEL: "STANDALONE"}
ADAPTIVE = "sglang-adaptive.json"


def sglang(setting: Setting) -> Words:
    """Give the options of `setting`; `ExportError` where SGLang has no words for it."""
    if setting.off:
        return Words(None, "", (), ("leave --speculative-algorithm out: nothing is drafted",))
    family = setting.family("SGLang", ALGORITHMS)
    adaptive = _adaptive(setting)
    if adaptive is not None and family not in (EAGLE, EAGLE3):
        raise ExportError("SGLang lets the length depend on the batch for EAGLE and EAGLE-3 only, by adaptive steps")
    steps = _first_steps(setting, adaptive)
    options: dict[str, Any] = {"speculative_algorithm": ALGORITHMS[family]}
    notes, files = [], {}
    if family == LOOKUP:
        options |= {"speculative_num_draft_tokens": steps + 1, "speculative_ngram_max_bfs_breadth": 1}
        notes.append(
            "SGLang looks up n-grams in a cache of its own, not in the request alone: other drafts may match"
        )
    else:
        options |= {
            "speculative_draft_model_path": setting.model(family),
            "speculative_num_steps": steps,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": steps + 1,
        }
    if adaptive is not None:
        options |= {"speculative_adaptive": True, "speculative_adaptive_config": ADAPTIVE}
        files[ADAPTIVE] = json.dumps(_flat(adaptive), indent=1) + "\n"
        notes.append(f"{ADAPTIVE} must be where the server is started, or named by its whole path")
    SglangArguments.model_validate(options)
    lines = [f"{key.replace('_', '-')}: {json.dumps(value)}\n" for key, value in options.items()]
    return Words("sglang.yaml", "".join(lines), tuple(_command(options)), tuple(notes), files)


def _command(options: dict[str, Any]) -> list[str]:
    words = []
    for key, value in options.items():
        words.append(f"--{key.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def _adaptive(setting: Setting) -> SglangAdaptiveConfig | None:
    """Give the adaptive steps: those of the policy, or for a table by batch size one tier with one length a range."""
    told = setting.stopping
    if setting.stopping["policy"] == "moving_average":
        from simulator.scenario.stopping import MovingAverage

        policy = MovingAverage.model_validate(dict(told))
        shared = {"ema_alpha": policy.ema_alpha, "update_interval": policy.update_interval}
        tiers = {key: tier.model_dump() for key, tier in policy.tiers.items()}
        return SglangAdaptiveConfig.model_validate(
            {**shared, "warmup_batches": policy.warmup_batches, "tiers": tiers}
        )
    _, table = setting.lengths("SGLang", ", and its adaptive steps (policy 'moving_average')")
    if table is None:
        return None
    return SglangAdaptiveConfig.model_validate(
        {"tiers": {str(first): {"candidate_steps": [tokens]} for first, _, tokens in table}}
    )


def _first_steps(setting: Setting, adaptive: SglangAdaptiveConfig | None) -> int:
    """Give ``speculative_num_steps``: the fixed length, or one of the adaptive steps to begin with."""
    if adaptive is None:
        return int(setting.stopping["draft_tokens"])
    wanted = (
        int(setting.stopping.get("initial_steps", 3))
        if setting.stopping["policy"] == "moving_average"
        else max(adaptive.steps)
    )
    return min(adaptive.steps - {0} or {0}, key=lambda step: (abs(step - wanted), step))


def _flat(adaptive: SglangAdaptiveConfig) -> dict[str, Any]:
    """Give the file's own form: tiers beside what they share."""
    told = adaptive.model_dump(mode="json")
    return {**{key: value for key, value in told.items() if key != "tiers"}, **told["tiers"]}
