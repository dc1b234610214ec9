"""OpenVINO GenAI: its scheduling by hand, an adapter that notices other behaviour, and the real engine.

The tests with the marker ``model`` download the verifier once and run it on one thread.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from once import Once

import calibration.engines.openvino as openvino_module
from calibration.common.errors import CalibrationError, MissingExtraError
from calibration.common.fetch import PUBLISHED, fetch_gguf
from calibration.engines.drive import EngineRequest, Step, drain
from calibration.engines.openvino import OpenVinoEngine, write_ir
from calibration.engines.openvino_plan import Account, OpenVinoSettings, Plan, plan_step
from calibration.engines.record import Condition, measure
from calibration.importers.measured_run import TokenDrafter, import_measured_run
from calibration.measured import MeasuredRun
from calibration.observe.prompts import Prompt
from calibration.proposers import LookupSettings
from calibration.proposers.lookup import NgramIndex

# --- Scheduling, by hand.


def account(number: int, prompt: int, *received: int, wants: int = 10, index: bool = False) -> Account:
    """A request with a prompt of tokens 1, 2, ...; computed where it has received something."""
    ids = list(range(1, prompt + 1))
    made = Account(number, ids, wants, NgramIndex(ids, max_draft_tokens=4) if index else None)
    made.computed = prompt if received else 0
    if received:
        made.take(received)
    return made


def shown(plan: Plan) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(request, tokens computed) of those that decode, and of prompts."""
    return (
        [(decode.account.request_id, decode.new_tokens) for decode in plan.decodes],
        [(chunk.account.request_id, chunk.tokens) for chunk in plan.chunks],
    )


def test_fused_steps_decode_first_and_cut_prompts_to_what_is_left() -> None:
    accounts = [account(0, 5, 7), account(1, 20), account(2, 4, 7), account(3, 6)]
    settings = OpenVinoSettings(max_num_batched_tokens=24, max_num_seqs=1)
    assert shown(plan_step(accounts, settings)) == ([(0, 1), (2, 1)], [(1, 20), (3, 2)])
    accounts[3].computed = 2
    accounts[1].computed = 20
    accounts[1].take([7])
    assert shown(plan_step(accounts, settings)) == ([(0, 1), (1, 1), (2, 1)], [(3, 4)])
    assert shown(plan_step(accounts, OpenVinoSettings(max_num_batched_tokens=2))) == ([(0, 1), (1, 1)], [])


def test_separate_steps_take_whole_prompts_in_order_or_decode() -> None:
    accounts = [account(0, 5, 7), account(1, 9), account(2, 8), account(3, 2)]
    settings = OpenVinoSettings(max_num_batched_tokens=16, max_num_seqs=4, dynamic_split_fuse=False)
    assert shown(plan_step(accounts, settings)) == ([], [(1, 9)])  # 2 does not fit behind 1, and 3 waits for it
    few = OpenVinoSettings(max_num_batched_tokens=32, max_num_seqs=3, dynamic_split_fuse=False)
    assert shown(plan_step(accounts, few)) == ([], [(1, 9), (2, 8)])
    one = OpenVinoSettings(max_num_batched_tokens=32, max_num_seqs=1, dynamic_split_fuse=False)
    assert shown(plan_step(accounts, one)) == ([(0, 1)], [])


def test_lookup_pays_for_padding_and_never_drafts_the_last_token() -> None:
    settings = OpenVinoSettings("prompt-lookup", 4, 3)
    match = account(0, 6, 1, 2, index=True)  # 1 2 came before, 3 4 5 6 followed
    nothing = account(1, 6, 9, index=True)
    ending = account(2, 6, 1, 2, wants=5, index=True)
    last = account(3, 6, 1, 2, wants=3, index=True)
    plan = plan_step([match, nothing, ending, last], settings)
    assert [decode.proposal for decode in plan.decodes] == [(3, 4, 5, 6), (), (3, 4), ()]
    assert [decode.drafted for decode in plan.decodes] == [4, 0, 2, 0]
    assert [decode.new_tokens for decode in plan.decodes] == [5, 5, 5, 5]


def test_a_draft_model_drafts_what_can_still_be_received() -> None:
    settings = OpenVinoSettings("draft-model", 3)
    plan = plan_step([account(0, 6, 1), account(1, 6, 1, wants=3), account(2, 6, 1, wants=2)], settings)
    assert [(decode.drafted, decode.new_tokens) for decode in plan.decodes] == [(3, 4), (1, 2), (0, 1)]
    assert plan.decodes[0].proposal is None


def test_accounts_know_what_is_cached() -> None:
    one = account(0, 5, 7, 8)
    assert (one.cached, one.left, one.decoding) == (6, 8, True)
    assert account(1, 5).cached == 0


PLANS: dict[str, tuple[OpenVinoSettings, list[Account], str]] = {
    "memory": (OpenVinoSettings(num_kv_blocks=1), [account(0, 32, 1)], "num_kv_blocks: .*, got 1 of 2"),
    "drafts": (
        OpenVinoSettings("prompt-lookup", 4, 3, max_num_batched_tokens=8),
        [account(0, 6, 1, index=True), account(1, 6, 1, index=True)],
        "max_num_batched_tokens: must hold a token and its drafts for every request",
    ),
    "parts": (
        OpenVinoSettings("draft-model", 4, max_num_batched_tokens=8),
        [account(0, 9)],
        "max_num_batched_tokens: must hold every prompt whole beside all drafts",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_cannot_be_seen_from_outside_is_refused(name: str) -> None:
    settings, accounts, message = PLANS[name]
    with pytest.raises(CalibrationError, match=message):
        plan_step(accounts, settings)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"mode": "beam"}, "mode: must be one of plain, prompt-lookup, draft-model, got 'beam'"),
    "sizes": ({"num_kv_blocks": 0, "threads": 1.5}, "num_kv_blocks: must be .* >= 1, got 0; threads: .* got 1.5"),
    "no drafts": ({"mode": "prompt-lookup"}, "num_assistant_tokens: must be .*None; max_ngram_size: must be .*None"),
    "drafts": ({"max_ngram_size": 3}, "max_ngram_size: must be left out in mode plain, got 3"),
    "ngram": ({"mode": "draft-model", "num_assistant_tokens": 3, "max_ngram_size": 3}, "must be left out in mode dr"),
    "separate": (
        {"mode": "prompt-lookup", "num_assistant_tokens": 3, "max_ngram_size": 3, "dynamic_split_fuse": False},
        "dynamic_split_fuse: must be true in mode prompt-lookup",
    ),
    "seqs": (
        {"dynamic_split_fuse": False, "max_num_batched_tokens": 64},
        "max_num_seqs: must be <= .* = 64.*got 256",
    ),
    "numerics": ({"numerics": "int8"}, "numerics: must be one of exact, engine, got 'int8'"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_are_refused(name: str) -> None:
    options, message = SETTINGS[name]
    with pytest.raises(CalibrationError, match=f"openvino: .*{message}"):
        OpenVinoSettings(**options)


# --- The adapter, over a pipeline that does what a test tells it.


@dataclass
class Handle:
    """What a request receives."""

    tokens: list[int] = field(default_factory=list)

    def can_read(self) -> bool:
        return bool(self.tokens)

    def read(self) -> dict[int, Any]:
        found, self.tokens = self.tokens, []
        return {0: SimpleNamespace(generated_ids=found)}


@dataclass
class Pipeline:
    """Each entry of `script` is a step: how many requests it serves, and the tokens that they receive."""

    script: list[tuple[int, dict[int, list[int]]]]
    handles: dict[int, Handle] = field(default_factory=dict)
    configs: list[Any] = field(default_factory=list)
    scheduled: int = 0

    def add_request(self, number: int, prompt: Any, config: Any) -> Handle:
        self.handles[number] = Handle()
        self.configs.append(config)
        return self.handles[number]

    def step(self) -> None:
        if not self.script:
            raise RuntimeError("Check failed at somewhere.cpp:1:\nout of script")
        self.scheduled, given = self.script.pop(0)
        for number, tokens in given.items():
            self.handles[number].tokens += tokens

    def has_non_finished_requests(self) -> bool:
        return False

    def get_metrics(self) -> Any:
        return SimpleNamespace(scheduled_requests=self.scheduled)


def adapter(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: OpenVinoSettings,
    *script: tuple[int, dict[int, list[int]]],
) -> tuple[OpenVinoEngine, Pipeline]:
    """An engine over a `Pipeline`."""
    pipeline = Pipeline(list(script))
    genai = SimpleNamespace(
        __version__="fake",
        SchedulerConfig=SimpleNamespace,
        GenerationConfig=SimpleNamespace,
        ContinuousBatchingPipeline=lambda *arguments: pipeline,
    )
    modules = {"openvino_genai": genai, "openvino": SimpleNamespace(Tensor=lambda array: array)}
    monkeypatch.setattr(openvino_module, "_require", modules.__getitem__)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    return OpenVinoEngine(model, "verifier", settings, touch=False), pipeline


LOOKUP = OpenVinoSettings("prompt-lookup", 2, 3)
PROMPT = (1, 2, 3, 4)


def test_a_step_says_what_was_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine, pipeline = adapter(
        monkeypatch,
        tmp_path,
        LOOKUP,
        (1, {0: [1]}),
        (2, {0: [2, 3, 9], 1: [7]}),
        (2, {0: [5], 1: [7]}),
        (1, {1: [1]}),
    )
    engine.submit(EngineRequest(0, PROMPT, 5))
    first = engine.step()
    assert (first.operation, first.prefill_sequences, first.prefill_tokens, first.new_tokens) == ("prefill", 1, 4, 0)
    engine.submit(EngineRequest(1, PROMPT[:3], 3))
    mixed = engine.step()
    assert mixed.operation == "mixed"
    assert (mixed.sequences, mixed.new_tokens, mixed.context_tokens, mixed.prefill_tokens) == (1, 3, 4, 3)
    assert mixed.received == {0: [2, 3, 9], 1: [7]}
    assert (mixed.drafted_tokens, mixed.accepted_tokens) == ({0: 2}, {0: 2})
    decode = engine.step()
    assert decode.operation == "decode"
    assert (decode.sequences, decode.new_tokens, decode.context_tokens) == (2, 6, 7 + 3)
    assert (decode.drafted_tokens, decode.accepted_tokens) == ({0: 0, 1: 0}, {0: 0, 1: 0})
    assert engine.busy
    engine.step()
    assert not engine.busy
    assert (decode.cpu_s is None, decode.wall_s is None) == (False, False)
    assert [vars(config)["max_new_tokens"] for config in pipeline.configs] == [5, 3]
    assert engine.info.settings["num_assistant_tokens"] == 2
    engine.close()


SURPRISES: dict[str, tuple[tuple[int, dict[int, list[int]]], str]] = {
    "another batch": ((2, {0: [2]}), "must serve 1 requests, got 2"),
    "nobody": ((1, {}), r"must give tokens to requests \[0\], got \[\]"),
    "too many": ((1, {0: [2, 3, 4, 1]}), "must give request 0 at most 3 tokens, got 4"),
}


@pytest.mark.parametrize("name", SURPRISES)
def test_an_engine_that_does_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    surprise, message = SURPRISES[name]
    engine, _ = adapter(monkeypatch, tmp_path, LOOKUP, (1, {0: [1]}), surprise)
    engine.submit(EngineRequest(0, PROMPT, 9))
    engine.step()
    with pytest.raises(CalibrationError, match=f"by its scheduling rules the step {message}"):
        engine.step()


def test_other_drafts_than_the_rule_gives_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine, _ = adapter(monkeypatch, tmp_path, LOOKUP, (1, {0: [1]}), (1, {0: [9, 3]}))  # 2 3 was to be drafted
    engine.submit(EngineRequest(0, PROMPT, 9))
    engine.step()
    with pytest.raises(CalibrationError, match=r"must accept 0 of \[2, 3\] for request 0, got 1"):
        engine.step()


def test_a_first_token_comes_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine, _ = adapter(monkeypatch, tmp_path, LOOKUP, (1, {0: [1, 2]}))
    engine.submit(EngineRequest(0, PROMPT, 9))
    with pytest.raises(CalibrationError, match="must give request 0 its first token alone, got 2"):
        engine.step()


def test_requests_that_cannot_be_served_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine, _ = adapter(monkeypatch, tmp_path, LOOKUP)
    engine.submit(EngineRequest(0, PROMPT, 9))
    for request, message in (
        (EngineRequest(0, PROMPT, 9), "request 0: must have an id that no other request"),
        (EngineRequest(1, PROMPT, 0), "request 1: output_tokens: must be at least 1, got 0"),
        (EngineRequest(1, (1, 2), 9), "request 1: must have a prompt of at least 3 tokens, got 2"),
    ):
        with pytest.raises(CalibrationError, match=message):
            engine.submit(request)
    with pytest.raises(CalibrationError, match="openvino: a step failed, out of script"):
        engine.step()
    whole = OpenVinoSettings(max_num_batched_tokens=3, max_num_seqs=2, dynamic_split_fuse=False)
    separate, _ = adapter(monkeypatch, tmp_path, whole)
    with pytest.raises(
        CalibrationError, match="at most max_num_batched_tokens = 3 tokens without dynamic_split_fuse"
    ):
        separate.submit(EngineRequest(0, PROMPT, 9))


def test_the_extra_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(MissingExtraError, match=r"openvino_genai: not installed; pip install 'paceline\[engines\]'"):
        OpenVinoEngine(tmp_path, "x")


def test_a_draft_model_belongs_to_its_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="must be given exactly in mode draft-model, got mode plain"):
        OpenVinoEngine(tmp_path, "x", draft_model=tmp_path, draft_name="d")
    with pytest.raises(CalibrationError, match="must be given exactly in mode draft-model, got mode draft-model"):
        OpenVinoEngine(tmp_path, "x", OpenVinoSettings("draft-model", 2))
    adapter(monkeypatch, tmp_path, LOOKUP)
    with pytest.raises(CalibrationError, match=r"nothing\.gguf: must be a GGUF file or an IR folder"):
        OpenVinoEngine(tmp_path / "nothing.gguf", "x")
    with pytest.raises(CalibrationError, match=r"nothing\.gguf: must be a GGUF file, it is not there"):
        write_ir(tmp_path / "nothing.gguf", tmp_path / "ir")


# --- The real engine.

real = pytest.mark.skipif(
    importlib.util.find_spec("openvino_genai") is None, reason="openvino_genai (extra 'engines') is not installed"
)
SIZES = {"num_kv_blocks": 24, "max_num_batched_tokens": 48}
TEXTS = {
    "list": "List the days of the week, then list them again.",
    "copy": "Repeat after me: the green house stands on the green hill behind the green wood.",
    "talk": "What is rain?",
}
TOKENS, DRAFT, NGRAM = 20, 3, 3


def run(engine: OpenVinoEngine, prompts: list[Prompt], folder: Path, concurrency: int) -> MeasuredRun:
    """Record one repeat over all prompts."""
    condition = Condition(folder.name, "fit", "", "0", repeats=1)
    return measure(folder, condition, engine, lambda: Once(prompts, TOKENS, concurrency=concurrency), prompts)


@pytest.fixture(scope="module")
def gguf() -> Path:
    return fetch_gguf(PUBLISHED["smollm2-135m"])


@pytest.fixture(scope="module")
def plain(gguf: Path) -> Iterator[OpenVinoEngine]:
    engine = OpenVinoEngine(gguf, "smollm2-135m", OpenVinoSettings(**SIZES))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts(plain: OpenVinoEngine) -> list[Prompt]:
    return [Prompt(name, "chat", tuple(plain.encode(text))) for name, text in TEXTS.items()]


@pytest.fixture(scope="module")
def measured(plain: OpenVinoEngine, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> MeasuredRun:
    return run(plain, prompts, tmp_path_factory.mktemp("plain") / "plain", 3)


@real
@pytest.mark.model
def test_a_prompt_is_templated_and_encoded(plain: OpenVinoEngine) -> None:
    # As transformers has it with the model's own chat template: system, user and the beginning of the answer.
    ids = plain.encode("What is rain?")
    assert ids[:4] == [1, 9690, 198, 2683]
    assert ids[-4:] == [1, 520, 9531, 198]


@real
@pytest.mark.model
def test_a_plain_run_computes_every_token_once(measured: MeasuredRun, prompts: list[Prompt]) -> None:
    steps = measured.steps.to_pandas()
    assert set(steps.operation) == {"prefill", "mixed", "decode"}
    assert steps.prefill_tokens.sum() == sum(len(prompt.token_ids or ()) for prompt in prompts)
    assert steps.new_tokens.sum() == len(prompts) * (TOKENS - 1)
    assert (steps.new_tokens + steps.prefill_tokens).max() <= SIZES["max_num_batched_tokens"]
    assert (steps.prefill_context_tokens > 0).any()  # a prompt in parts
    assert (steps.seconds > 0).all()
    assert measured.manifest.engine.name == "openvino-genai"
    assert "openvino-genai" in measured.manifest.software


@real
@pytest.mark.model
def test_the_rounds_of_prompt_lookup_follow_from_the_text_of_a_plain_run(
    gguf: Path, measured: MeasuredRun, prompts: list[Prompt], tmp_path: Path
) -> None:
    drafter = TokenDrafter("lookup", LookupSettings(ngram_max=NGRAM))
    positions = import_measured_run(measured, prompts, [drafter]).frame("positions").set_index("sequence_id")
    engine = OpenVinoEngine(
        gguf, "smollm2-135m", OpenVinoSettings("prompt-lookup", DRAFT, NGRAM, **SIZES), touch=False
    )
    live = run(engine, prompts, tmp_path / "lookup", 2)
    engine.close()
    texts = {row["sequence_id"]: row["output_token_ids"] for row in measured.requests.to_pylist()}
    accepted = 0
    for row in live.requests.to_pylist():
        mine = positions.loc[row["sequence_id"]].set_index("position")
        emitted, drafted, t = [1], 0, 1
        while t < TOKENS:
            proposed = min(DRAFT, TOKENS - t - 1, int(mine.proposal_length[t]))
            emitted.append(min(proposed, int(mine.run_length[t])) + 1)
            drafted, t = drafted + proposed, t + emitted[-1]
        assert row["output_token_ids"] == texts[row["sequence_id"]]
        assert row["emitted"] == emitted
        assert row["drafted_tokens"] == drafted
        accepted += row["accepted_tokens"]
    assert accepted > 10
    steps = live.steps.to_pandas()
    assert (steps.new_tokens == steps.sequences * (DRAFT + 1)).all()


@real
@pytest.mark.model
def test_a_verifier_that_drafts_for_itself_is_almost_always_right(
    gguf: Path, measured: MeasuredRun, prompts: list[Prompt], tmp_path: Path
) -> None:
    folder = write_ir(gguf, tmp_path / "ir")
    settings = OpenVinoSettings("draft-model", DRAFT, num_kv_blocks=24)
    engine = OpenVinoEngine(folder, "smollm2-135m", settings, draft_model=folder, draft_name="itself", touch=False)
    live = run(engine, prompts, tmp_path / "draft", 2)
    assert [text[:6] for text in engine.unknown] == ["draft ", "drafte"]
    engine.close()
    texts = {row["sequence_id"]: row["output_token_ids"] for row in measured.requests.to_pylist()}
    always_right = 0
    for row in live.requests.to_pylist():
        assert row["output_token_ids"] == texts[row["sequence_id"]]
        always_right += row["emitted"] == [1, *[DRAFT + 1] * 4, TOKENS - 17]  # as long as may be, to the very end
        assert row["drafted_tokens"] - row["accepted_tokens"] <= 6
    assert always_right >= len(TEXTS) - 1  # one text has two near ties, which turn with the rounding of a pass


@real
@pytest.mark.model
def test_an_open_request_does_not_outlive_the_engine(gguf: Path, prompts: list[Prompt]) -> None:
    settings = OpenVinoSettings(num_kv_blocks=8, max_num_batched_tokens=64, max_num_seqs=1, dynamic_split_fuse=False)
    engine = OpenVinoEngine(gguf, "smollm2-135m", settings)
    for number, prompt in enumerate(prompts[:2]):
        engine.submit(EngineRequest(number, prompt.token_ids or (), 3))
    served: list[Step] = [engine.step() for _ in range(4)]
    assert [step.operation for step in served] == ["prefill", "decode", "decode", "prefill"]
    drain(engine)
    engine.submit(EngineRequest(7, prompts[0].token_ids or (), 3))
    engine.step()
    engine.close()
