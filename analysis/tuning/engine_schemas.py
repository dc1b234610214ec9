"""What three engines accept for speculative decoding, in our own words: strict models of the documented options.

Only what the exports write is modelled; an unknown key, a value out of range or a broken rule between keys is refused
as the engine would refuse it. Sources, read in November 2026:

vLLM            class SpeculativeConfig, vllm/config/speculative.py at 002e77c, the schedule's rules in
                vllm/v1/spec_decode/dynamic/utils.py, and docs/features/speculative_decoding/
                dynamic_speculative_decoding.md at 015a47e (contiguity from 1, every K at most the maximum)
SGLang          class ServerArgs, python/sglang/srt/server_args.py; docs/advanced_features/speculative_decoding.md at
                067ad4d; python/sglang/srt/speculative/adaptive_spec_params.py at 015c872
TensorRT-LLM    DecodingBaseConfig and its subclasses, tensorrt_llm/llmapi/llm_args.py; LLM API reference 1.4.0rc1
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from calibration.common.settings import Count, Natural, Table

Entry = Annotated[tuple[Count, Count, Natural], Field(strict=False)]


class VllmSpeculativeConfig(Table):
    """The JSON of ``vllm serve --speculative-config``.

    `num_speculative_tokens` is the longest draft, without the bonus token. Entries of the schedule are
    [first batch size, last batch size, K].
    """

    method: Literal["ngram", "suffix", "draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "mtp"]
    model: Annotated[str, Field(min_length=1)] | None = None
    num_speculative_tokens: Count
    num_speculative_tokens_per_batch_size: Annotated[tuple[Entry, ...], Field(min_length=1, strict=False)] | None = (
        None
    )
    prompt_lookup_max: Count | None = None
    prompt_lookup_min: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needs_model = self.method in ("draft_model", "eagle", "eagle3", "medusa", "mlp_speculator")
        if needs_model and self.model is None:
            raise ValueError(f"method '{self.method}' needs model")
        if self.method != "ngram" and (self.prompt_lookup_max or self.prompt_lookup_min):
            raise ValueError("prompt_lookup_max and prompt_lookup_min are for method 'ngram'")
        if (self.prompt_lookup_min or 1) > (self.prompt_lookup_max or self.prompt_lookup_min or 1):
            raise ValueError("prompt_lookup_min must be at most prompt_lookup_max")
        expected = 1
        for first, last, tokens in self.num_speculative_tokens_per_batch_size or ():
            if first != expected or last < first:
                raise ValueError(f"ranges must be contiguous from 1: expected one from {expected}")
            if tokens > self.num_speculative_tokens:
                raise ValueError(f"K must be at most num_speculative_tokens = {self.num_speculative_tokens}")
            expected = last + 1
        return self


class SglangTier(Table):
    """One range of batch sizes of SGLang's adaptive configuration; 0 steps draft nothing."""

    candidate_steps: Annotated[tuple[Natural, ...], Field(min_length=1, strict=False)]
    up_hysteresis: float = 0.0
    down_hysteresis: float = -0.25
    ceiling_coeff: Annotated[float, Field(ge=0)] = 0.0


class SglangAdaptiveConfig(Table):
    """The JSON file of ``--speculative-adaptive-config``: tiers by their smallest batch size, and what all share."""

    ema_alpha: Annotated[float, Field(gt=0, le=1)] = 0.2
    update_interval: Count = 5
    warmup_batches: Natural = 10
    tiers: Annotated[dict[Annotated[str, Field(pattern=r"^[1-9][0-9]*$")], SglangTier], Field(min_length=1)]

    @property
    def steps(self) -> set[int]:
        """All steps of all tiers."""
        return {step for tier in self.tiers.values() for step in tier.candidate_steps}


class SglangArguments(Table):
    """Options of ``sglang.launch_server``; `speculative_num_draft_tokens` counts the bonus token."""

    speculative_algorithm: Literal["EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "NGRAM"]
    speculative_draft_model_path: Annotated[str, Field(min_length=1)] | None = None
    speculative_num_steps: Natural | None = None
    speculative_eagle_topk: Count | None = None
    speculative_num_draft_tokens: Count
    speculative_ngram_max_bfs_breadth: Count | None = None
    speculative_adaptive: bool | None = None
    speculative_adaptive_config: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        lookup = self.speculative_algorithm == "NGRAM"
        if lookup:
            if self.speculative_draft_model_path or self.speculative_num_steps or self.speculative_eagle_topk:
                raise ValueError("NGRAM has no draft model, steps or topk")
        else:
            if self.speculative_ngram_max_bfs_breadth is not None:
                raise ValueError("speculative_ngram_max_bfs_breadth is for NGRAM")
            if self.speculative_algorithm in ("EAGLE3", "STANDALONE") and not self.speculative_draft_model_path:
                raise ValueError(f"{self.speculative_algorithm} needs speculative_draft_model_path")
            if self.speculative_num_steps is None or self.speculative_eagle_topk is None:
                raise ValueError("steps, topk and draft tokens are set together or not at all")
            if (
                self.speculative_eagle_topk == 1
                and self.speculative_num_draft_tokens != self.speculative_num_steps + 1
            ):
                raise ValueError("with topk 1, draft tokens must be steps + 1")
        if self.speculative_adaptive:
            if self.speculative_algorithm not in ("EAGLE", "EAGLE3") or self.speculative_eagle_topk != 1:
                raise ValueError("adaptive steps are for EAGLE and EAGLE3 with topk 1")
        elif self.speculative_adaptive_config is not None:
            raise ValueError("speculative_adaptive_config is read with speculative_adaptive only")
        return self


class TensorrtDecoding(Table):
    """``speculative_config`` of TensorRT-LLM's LLM API, PyTorch backend. Lengths are without the bonus token.

    A batch takes the length of the smallest key of `draft_len_schedule` that is at least its size, and drafts nothing
    above the largest.
    """

    decoding_type: Literal["NGram", "Eagle3", "Draft_Target", "MTP"]
    max_draft_len: Count
    speculative_model: Annotated[str, Field(min_length=1)] | None = None
    max_matching_ngram_size: Count | None = None
    draft_len_schedule: Annotated[dict[Count, Natural], Field(min_length=1)] | None = None
    max_concurrency: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.decoding_type in ("Eagle3", "Draft_Target") and self.speculative_model is None:
            raise ValueError(f"decoding_type '{self.decoding_type}' needs speculative_model")
        if self.max_matching_ngram_size is not None and self.decoding_type != "NGram":
            raise ValueError("max_matching_ngram_size is for decoding_type 'NGram'")
        schedule = self.draft_len_schedule
        if schedule is None:
            return self
        if self.max_concurrency is not None:
            raise ValueError("max_concurrency and draft_len_schedule exclude each other")
        if schedule[min(schedule)] != self.max_draft_len:
            raise ValueError("the length of the smallest key must equal max_draft_len")
        if max(schedule.values()) > self.max_draft_len:
            raise ValueError("lengths must be at most max_draft_len")
        return self


class TensorrtOptions(Table):
    """The YAML file of ``trtllm-serve --extra_llm_api_options``."""

    speculative_config: TensorrtDecoding
