"""One small import of each grade: counters of a run, and answers with their rounds."""

from __future__ import annotations

import json
from pathlib import Path

from calibration.importers import import_vllm_counters, import_vllm_requests
from calibration.importers.origin import Origin
from calibration.traces import TraceSet

COUNTERS = """vllm:spec_decode_num_drafts_total 1000
vllm:spec_decode_num_draft_tokens_total 3000
vllm:spec_decode_num_accepted_tokens_total 1800
vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 800
vllm:spec_decode_num_accepted_tokens_per_pos_total{position="1"} 600
vllm:spec_decode_num_accepted_tokens_per_pos_total{position="2"} 400
"""


MODEL = Origin(drafter="small", paradigm="draft_model", temperature=0.0)


def answer(accepted: list[int], *, detailed: bool = True) -> str:
    """An answer as vLLM gives it, whose rounds drafted 3 tokens each."""
    spec: dict[str, object] = {
        "acceptance_histogram": [accepted.count(j) for j in range(4)],
        "num_spec_steps": len(accepted),
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": 3 * len(accepted),
        "num_spec_tokens": 3,
    }
    if detailed:
        spec |= {"per_step_accepted": accepted, "per_step_drafted": [3] * len(accepted)}
    usage = {"prompt_tokens": 11, "completion_tokens": 1 + sum(accepted) + len(accepted)}
    told = {"model": "verifier-8b", "choices": [{"finish_reason": "length"}], "usage": usage}
    return json.dumps(told | {"metrics": {"speculative_decoding": spec}}) + "\n"


def from_answers(folder: Path, *, detailed: bool = True) -> TraceSet:
    file = folder / "answers.jsonl"
    file.write_text("".join(answer([1, 3, 0, 2], detailed=detailed) for _ in range(12)), encoding="utf-8")
    return import_vllm_requests([file], origin=MODEL)


def from_counters(folder: Path) -> TraceSet:
    page = folder / "metrics.txt"
    page.write_text(COUNTERS, encoding="utf-8")
    return import_vllm_counters(page, lengths=[(10, 57)] * 50, origin=Origin(paradigm="eagle3"))
