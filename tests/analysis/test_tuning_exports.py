"""Exports: each is read back and checked against the engine's documented options; what has no words is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import ValidationError
from scenarios import traces_of
from several import several

from analysis.common.bootstrap import Estimate
from analysis.tuning import TuneFindings, TuneSettings, tune
from analysis.tuning.engine_schemas import (
    SglangAdaptiveConfig,
    SglangArguments,
    TensorrtOptions,
    VllmSpeculativeConfig,
)
from analysis.tuning.export import (
    ADAPTIVE,
    FILE,
    Setting,
    Words,
    check_exports,
    export,
    parse_models,
    setting_of,
    sglang,
    tensorrt_llm,
    vllm,
)
from analysis.tuning.findings import Scored
from calibration.common.errors import ExportError, ScenarioError
from calibration.traces.manifest import DrafterInfo
from simulator.scenario.loading import parse_scenario

TABLE = [[1, 4, 5], [5, 16, 2], [17, 32, 0]]
RISING = [[1, 1, 2], [2, 32, 5]]


def drafter(paradigm: str, **settings: Any) -> DrafterInfo:
    return DrafterInfo(name="d", paradigm=paradigm, deterministic=False, settings=settings)


def setting(paradigm: str, stopping: Mapping[str, Any], model: str | None = "weights/d", **told: Any) -> Setting:
    models = {} if model is None else {"d": model}
    return Setting("made", None, stopping, (drafter(paradigm, **told),), models, 64)


def of_length(tokens: int) -> dict[str, Any]:
    return {"policy": "fixed", "draft_tokens": tokens}


def by_batch(table: list[list[int]]) -> dict[str, Any]:
    return {"policy": "by_batch", "table": table}


def read_yaml(text: str) -> Any:
    return pytest.importorskip("yaml").safe_load(text)


def vllm_config(words: Words) -> VllmSpeculativeConfig:
    assert words.arguments[0] == "--speculative-config"
    assert json.loads(words.arguments[1]) == json.loads(words.content)
    return VllmSpeculativeConfig.model_validate(json.loads(words.content))


@pytest.mark.parametrize(
    ("paradigm", "method"),
    [("eagle", "eagle"), ("eagle3", "eagle3"), ("distilled", "draft_model"), ("medusa", "medusa")],
)
def test_vllm_names_the_method_of_a_drafter_with_weights(paradigm: str, method: str) -> None:
    config = vllm_config(vllm(setting(paradigm, of_length(3))))
    assert (config.method, config.model, config.num_speculative_tokens) == (method, "weights/d", 3)
    assert config.num_speculative_tokens_per_batch_size is None


def test_vllm_ngram_has_its_sizes_and_no_model() -> None:
    config = vllm_config(vllm(setting("prompt-lookup", of_length(4), None, ngram_max=3, ngram_min=1)))
    assert (config.method, config.model) == ("ngram", None)
    assert (config.prompt_lookup_max, config.prompt_lookup_min) == (3, 1)


def test_vllm_schedule_is_contiguous_from_1_to_the_largest_batch() -> None:
    config = vllm_config(vllm(setting("eagle3", by_batch(TABLE))))
    assert config.num_speculative_tokens == 5
    assert config.num_speculative_tokens_per_batch_size == ((1, 4, 5), (5, 16, 2), (17, 64, 0))
    looked_up = vllm(setting("ngram", by_batch(TABLE), None))
    assert any("tested with EAGLE" in note for note in looked_up.notes)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"num_speculative_tokens_per_batch_size": [[2, 4, 1]]}, "contiguous from 1"),
        ({"num_speculative_tokens_per_batch_size": [[1, 4, 1], [6, 8, 0]]}, "contiguous from 1"),
        ({"num_speculative_tokens_per_batch_size": [[1, 4, 9]]}, "at most num_speculative_tokens"),
        ({"num_speculative_tokens_per_batch_size": []}, "at least 1 item"),
        ({"num_speculative_tokens": 0}, "greater than or equal to 1"),
        ({"num_speculative_tokens": "3"}, "valid integer"),
        ({"model": None}, "needs model"),
        ({"method": "layer-skip"}, "Input should be"),
        ({"speculative_model": "x"}, "Extra inputs"),
        ({"prompt_lookup_max": 3}, "for method 'ngram'"),
    ],
)
def test_vllm_schema_refuses_what_vllm_refuses(change: dict[str, Any], rule: str) -> None:
    good = {"method": "eagle", "model": "weights/d", "num_speculative_tokens": 5}
    VllmSpeculativeConfig.model_validate(good)
    with pytest.raises(ValidationError, match=rule):
        VllmSpeculativeConfig.model_validate(good | change)


def sglang_options(words: Words) -> SglangArguments:
    """Read the options from the file and from the command line; they must say the same."""
    told = {key.replace("-", "_"): value for key, value in read_yaml(words.content).items()}
    line = list(words.arguments)
    typed: dict[str, Any] = {}
    while line:
        key = line.pop(0).removeprefix("--").replace("-", "_")
        typed[key] = True if not line or line[0].startswith("--") else line.pop(0)
    assert {key: str(value) for key, value in told.items()} == {key: str(value) for key, value in typed.items()}
    return SglangArguments.model_validate(told)


@pytest.mark.parametrize(
    ("paradigm", "algorithm"), [("eagle", "EAGLE"), ("eagle3", "EAGLE3"), ("standalone", "STANDALONE")]
)
def test_sglang_counts_the_bonus_token_among_its_draft_tokens(paradigm: str, algorithm: str) -> None:
    options = sglang_options(sglang(setting(paradigm, of_length(3))))
    assert options.speculative_algorithm == algorithm
    assert (options.speculative_num_steps, options.speculative_eagle_topk) == (3, 1)
    assert options.speculative_num_draft_tokens == 4


def test_sglang_ngram_is_one_chain() -> None:
    options = sglang_options(sglang(setting("prompt-lookup", of_length(6), None)))
    assert options.speculative_algorithm == "NGRAM"
    assert (options.speculative_num_draft_tokens, options.speculative_ngram_max_bfs_breadth) == (7, 1)
    assert options.speculative_num_steps is None


def adaptive(words: Words) -> SglangAdaptiveConfig:
    told = json.loads(words.extra_files[ADAPTIVE])
    tiers = {key: value for key, value in told.items() if key.isdigit()}
    return SglangAdaptiveConfig.model_validate(
        {**{key: value for key, value in told.items() if not key.isdigit()}, "tiers": tiers}
    )


def test_sglang_lengths_by_batch_size_are_tiers_of_one_step() -> None:
    words = sglang(setting("eagle", by_batch(TABLE)))
    options, config = sglang_options(words), adaptive(words)
    assert {key: tier.candidate_steps for key, tier in config.tiers.items()} == {"1": (5,), "5": (2,), "17": (0,)}
    assert options.speculative_adaptive is True
    assert options.speculative_adaptive_config == ADAPTIVE
    assert options.speculative_num_steps in config.steps  # else the server does not start


def test_sglang_adaptive_steps_are_those_of_the_moving_average() -> None:
    words = sglang(setting("eagle3", {"policy": "moving_average", "ema_alpha": 0.3, "initial_steps": 4}))
    config = adaptive(words)
    assert config.ema_alpha == 0.3
    assert config.tiers["1"].candidate_steps == (1, 3, 5, 7)
    assert sglang_options(words).speculative_num_steps == 3


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"speculative_num_draft_tokens": 3}, "steps \\+ 1"),
        ({"speculative_num_steps": None}, "set together"),
        ({"speculative_algorithm": "MEDUSA"}, "Input should be"),
        ({"speculative_draft_model_path": None}, "needs speculative_draft_model_path"),
        ({"speculative_adaptive_config": "x.json"}, "with speculative_adaptive only"),
        ({"speculative_tokens": 3}, "Extra inputs"),
    ],
)
def test_sglang_schema_refuses_what_sglang_refuses(change: dict[str, Any], rule: str) -> None:
    good = {
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": "weights/d",
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
    }
    SglangArguments.model_validate(good)
    with pytest.raises(ValidationError, match=rule):
        SglangArguments.model_validate(good | change)


def tensorrt(words: Words) -> Any:
    assert words.arguments == ("--extra_llm_api_options", FILE)
    return TensorrtOptions.model_validate(read_yaml(words.content)).speculative_config


def test_tensorrt_llm_is_yaml_of_the_llm_api() -> None:
    words = tensorrt_llm(setting("eagle3", of_length(3), model='odd "name": #1'))
    config = tensorrt(words)
    assert (config.decoding_type, config.max_draft_len) == ("Eagle3", 3)
    assert config.speculative_model == 'odd "name": #1'
    lookup = tensorrt(tensorrt_llm(setting("prompt-lookup", of_length(4), None, ngram_max=3)))
    assert (lookup.decoding_type, lookup.max_matching_ngram_size) == ("NGram", 3)
    assert tensorrt(tensorrt_llm(setting("distilled", of_length(2)))).decoding_type == "Draft_Target"


def test_tensorrt_llm_schedule_names_the_largest_batch_of_each_length() -> None:
    config = tensorrt(tensorrt_llm(setting("eagle3", by_batch(TABLE))))
    assert config.draft_len_schedule == {4: 5, 16: 2}  # above 16 nothing is drafted
    assert config.max_draft_len == 5
    with pytest.raises(ExportError, match="longest draft at the smallest batches"):
        tensorrt_llm(setting("eagle3", by_batch(RISING)))


def test_tensorrt_llm_schema_refuses_what_it_refuses() -> None:
    good = {"decoding_type": "NGram", "max_draft_len": 4}
    TensorrtOptions.model_validate({"speculative_config": good})
    for change, rule in (
        ({"draft_len_schedule": {4: 2}}, "smallest key"),
        ({"draft_len_schedule": {4: 4, 8: 5}}, "at most max_draft_len"),
        ({"draft_len_schedule": {4: 4}, "max_concurrency": 8}, "exclude each other"),
        ({"decoding_type": "Eagle3"}, "needs speculative_model"),
        ({"max_draft_len": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=rule):
            TensorrtOptions.model_validate({"speculative_config": good | change})


@pytest.mark.parametrize("write", [vllm, sglang, tensorrt_llm])
def test_no_speculation_needs_no_option(write: Any) -> None:
    words = write(setting("early-exit", {"policy": "none"}))
    assert (words.file, words.arguments) == (None, ())
    assert "leave" in words.notes[0]
    assert write(setting("eagle3", by_batch([[1, 8, 0]]))).file is None


@pytest.mark.parametrize("write", [vllm, sglang, tensorrt_llm])
@pytest.mark.parametrize(
    ("paradigm", "stopping", "message"),
    [
        ("layer-skip", of_length(3), "no drafter of paradigm 'layer-skip' .*; it has n-gram lookup"),
        ("eagle3", {"policy": "confidence", "threshold": 0.4}, "no policy 'confidence'; it has one fixed length"),
        ("eagle3", {"policy": "goodput"}, "no policy 'goodput'"),
    ],
)
def test_what_an_engine_has_no_words_for_is_refused(
    write: Any, paradigm: str, stopping: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        write(setting(paradigm, stopping))


@pytest.mark.parametrize("write", [vllm, sglang, tensorrt_llm])
@pytest.mark.parametrize("rule", ["forecast", "context_match", "ucb"])
def test_a_rule_over_drafters_and_lengths_is_never_exported_as_its_longest_draft(write: Any, rule: str) -> None:
    """A forecast for one drafter has a fixed longest draft beside it, which is not what it drafts."""
    overrides = {"routing.drafter": {"policy": rule, "drafters": ["d"]}, "stopping": of_length(20)}
    none = Estimate(None, None, None, 1)
    scored = Scored("made", rule, ("d",), overrides, none, none, None, 2, "best")
    with pytest.raises(ExportError, match=f"has no rule '{rule}'"):
        write(setting_of(scored, {"d": drafter("eagle3")}, {"d": "x"}, 8))
    static = dataclasses.replace(scored, overrides={**overrides, "routing.drafter": {"policy": "static"}})
    assert write(setting_of(static, {"d": drafter("eagle3")}, {"d": "x"}, 8)).arguments


@pytest.mark.parametrize("write", [vllm, sglang, tensorrt_llm])
def test_weights_without_a_place_are_refused(write: Any) -> None:
    with pytest.raises(ExportError, match="--drafter-model d=PATH"):
        write(setting("eagle3", of_length(3), None))


def test_places_of_weights_are_read_by_name() -> None:
    lookup = DrafterInfo(name="ngram", paradigm="prompt-lookup", deterministic=True)
    eagle = drafter("eagle3")
    assert parse_models(["org/head"], [lookup, eagle]) == {"d": "org/head"}
    assert parse_models(["d=a=b"], [lookup, eagle]) == {"d": "a=b"}
    for texts, message in (
        (["e=x"], "no such drafter, got 'e'"),
        (["d="], "must be NAME=PATH"),
        (["d=x", "y"], None),
    ):
        if message is None:
            assert parse_models(texts, [lookup, eagle])["d"] == "y"
        else:
            with pytest.raises(ScenarioError, match=message):
                parse_models(texts, [lookup, eagle])
    with pytest.raises(ScenarioError, match="NAME=PATH where 0 drafters have weights"):
        parse_models(["x"], [lookup])


def test_exports_that_cannot_be_are_refused_before_anything_runs() -> None:
    with pytest.raises(ScenarioError, match=r"no such engine, got 'vlm'; did you mean 'vllm'\?"):
        check_exports(["vlm"], [drafter("eagle3")], {})
    with pytest.raises(
        ScenarioError, match=r"has words for n-gram lookup.* drafters only, got early-exit, layer-skip"
    ):
        check_exports(["tensorrt-llm"], [drafter("early-exit"), drafter("layer-skip")], {})
    with pytest.raises(ScenarioError, match="needs the place of the weights of 'd'"):
        check_exports(["vllm", "sglang"], [drafter("eagle3")], {})
    check_exports(["vllm", "sglang", "tensorrt-llm"], [drafter("eagle3"), drafter("layer-skip")], {"d": "x"})


@pytest.fixture(scope="module")
def found() -> TuneFindings:
    perfect = [[12 - t for t in range(12)] for _ in range(6)]
    costs = {
        "verifier": {"kind": "linear", "base_s": 0.02},
        "drafter": {"kind": "linear", "base_s": 0.001},
    }
    given = parse_scenario({"workload": {"kind": "closed", "concurrency": 1}, "costs": costs})
    settings = TuneSettings(replications=2, workers=1, draft_tokens=(1, 2))
    return tune(given, settings, traces=several({"d": perfect}))


def test_the_best_that_the_engine_can_express_is_exported_with_what_it_gives_up(found: TuneFindings) -> None:
    one = export(found, "vllm", [drafter("eagle3")], {"d": "weights/d"}, 8)
    config = VllmSpeculativeConfig.model_validate(json.loads(one.content))
    chosen = next(c for c in found.candidates if c.name == one.candidate)
    assert config.num_speculative_tokens == chosen.overrides["stopping"]["draft_tokens"]
    assert one.behind == chosen.behind
    assert (one.candidate == found.best.name) == (not any("not the best" in note for note in one.notes))
    off = export(found, "vllm", [drafter("layer-skip")], {}, 8)
    assert off.candidate == "no speculation"
    assert off.file is None
    assert "layer-skip" in off.notes[0]


def test_traces_of_one_drafter_are_enough() -> None:
    """A TraceSet of the simplest kind can be tuned and exported."""
    given = parse_scenario(
        {
            "workload": {"kind": "closed", "concurrency": 1},
            "costs": {"verifier": {"kind": "linear", "base_s": 0.02}, "drafter": {"kind": "linear", "base_s": 0.001}},
        }
    )
    findings = tune(
        given,
        TuneSettings(replications=2, workers=1, draft_tokens=(1,)),
        traces=traces_of([[3, 2, 1, 0], [1, 0, 1, 0]]),
    )
    info = DrafterInfo(name="drafter", paradigm="ngram", deterministic=True)
    assert export(findings, "sglang", [info], {}, 4).source
