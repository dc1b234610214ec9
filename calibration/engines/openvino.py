"""OpenVINO GenAI (extra ``engines``): a serving engine that is not ours, driven step by step on a CPU.

Its continuous batching has a paged KV memory, prompts computed in parts, and speculation by prompt lookup or a draft
model. What a step computed is known from its scheduling rules (`calibration.engines.openvino_plan`); every step is
checked against what can be seen from outside, so that an engine that does otherwise is refused.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from calibration.common.errors import CalibrationError, MissingExtraError
from calibration.common.files import fresh_folder
from calibration.engines.drive import EngineRequest, Operation, Step
from calibration.engines.openvino_plan import BLOCK_TOKENS, Account, Decode, OpenVinoSettings, Plan, plan_step
from calibration.measured.run import EngineInfo, Setting
from calibration.proposers.lookup import NgramIndex
from calibration.traces.surroundings import cpu_info

_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_TOKEN = 5
"""Any token: what it says is of no account where KV memory is only to be touched."""


class OpenVinoEngine:
    """An OpenVINO GenAI pipeline as an engine of `calibration.engines.drive`.

    `model` is a GGUF file or an IR folder, `name` what TraceSets call it. In the mode ``draft-model`` `draft_model`
    is the IR folder of the drafter (see `write_ir`), `draft_name` its name; drafting and verification are then one
    step, see `unknown`. `touch`: fill the KV memory once before anything is measured; else the first use of every
    block costs its page faults.

    Raises:
        MissingExtraError: the extra ``engines`` is not installed.
        CalibrationError: a model that the engine cannot load.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        name: str,
        settings: OpenVinoSettings | None = None,
        *,
        draft_model: str | os.PathLike[str] | None = None,
        draft_name: str | None = None,
        touch: bool = True,
    ) -> None:
        self._settings = settings = settings or OpenVinoSettings()
        if (settings.mode == "draft-model") != (draft_model is not None and draft_name is not None):
            rule = "draft_model and draft_name must be given exactly in mode draft-model"
            raise CalibrationError(f"openvino: {rule}, got mode {settings.mode}")
        self._genai = _require("openvino_genai")
        self._tensor = _require("openvino").Tensor
        self._pipeline: Any = self._load(Path(model), draft_model)
        self._accounts: list[Account] = []
        self._handles: dict[int, Any] = {}
        told: dict[str, Setting | None] = {**asdict(settings), "draft_model": draft_name}
        self.info = EngineInfo(
            name="openvino-genai",
            version=str(self._genai.__version__),
            settings={key: value for key, value in told.items() if value is not None},
        )
        self.device = cpu_info(settings.threads)
        self.model = name
        self.unknown: tuple[str, ...] = ()
        if settings.mode == "draft-model":
            self.unknown = (
                "draft steps: the engine tells no time of their own, seconds are those of whole rounds",
                "drafted tokens: from the engine's rule, not from what it says",
            )
        if touch:
            self._touch()

    def _load(self, model: Path, draft_model: str | os.PathLike[str] | None) -> Any:
        settings, genai = self._settings, self._genai
        scheduling = genai.SchedulerConfig()
        scheduling.cache_size = 0  # the number of blocks counts instead
        for name in ("max_num_batched_tokens", "max_num_seqs", "num_kv_blocks", "dynamic_split_fuse"):
            setattr(scheduling, name, getattr(settings, name))
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": settings.threads,
            "ENABLE_CPU_PINNING": False,  # else it keeps to the first core, whoever else is busy there
            "sampler_num_threads": settings.threads,
            **(_EXACT if settings.numerics == "exact" else {}),
        }
        more: dict[str, Any] = {"prompt_lookup": True} if settings.mode == "prompt-lookup" else {}
        for path in (model, *([] if draft_model is None else [Path(draft_model)])):
            if not path.exists():
                raise CalibrationError(f"{path}: must be a GGUF file or an IR folder, it is not there")
        try:
            if draft_model is not None:
                more["draft_model"] = genai.draft_model(
                    str(draft_model), "CPU", scheduler_config=scheduling, **properties
                )
            return genai.ContinuousBatchingPipeline(str(model), scheduling, "CPU", {**properties, **more})
        except RuntimeError as fault:
            raise CalibrationError(f"{model}: OpenVINO GenAI cannot load it, {_last_line(fault)}") from None

    def _touch(self) -> None:
        """Write into every KV block once, and free it again."""
        settings, number = self._settings, 1
        longest = settings.num_kv_blocks * BLOCK_TOKENS - 1
        if not settings.dynamic_split_fuse:  # whole prompts, as many as may be there at once
            longest = min(longest, settings.max_num_batched_tokens)
            number = min(settings.num_kv_blocks // -(-longest // BLOCK_TOKENS), settings.max_num_seqs)
        config = self._generation(1 if number == 1 else 2)
        handles = [self._add(i, [_TOKEN] * longest, config) for i in range(number)]
        while not all(handle.can_read() for handle in handles):
            self._run()
        del handles
        while self._pipeline.has_non_finished_requests():
            self._run()

    def encode(self, text: str) -> list[int]:
        """Give the token ids of `text` as one user turn in the model's chat template (plain text without one)."""
        tokenizer = self._pipeline.get_tokenizer()
        templated = bool(tokenizer.chat_template)
        if templated:
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=not templated).input_ids.data[0].tolist()
        return ids

    # --- the protocol

    def submit(self, request: EngineRequest) -> None:
        """Take a request; it waits until a step has room for it. `CalibrationError` where it can never be served."""
        settings, where = self._settings, f"openvino: request {request.request_id}"
        prompt = list(request.prompt_token_ids)
        if request.request_id in self._handles:
            raise CalibrationError(f"{where}: must have an id that no other request in the engine has")
        if request.output_tokens < 1:
            raise CalibrationError(f"{where}: output_tokens: must be at least 1, got {request.output_tokens}")
        least = settings.max_ngram_size or 1
        if len(prompt) < least:
            raise CalibrationError(f"{where}: must have a prompt of at least {least} tokens, got {len(prompt)}")
        if not settings.dynamic_split_fuse and len(prompt) > settings.max_num_batched_tokens:
            rule = f"must have a prompt of at most max_num_batched_tokens = {settings.max_num_batched_tokens} tokens"
            raise CalibrationError(f"{where}: {rule} without dynamic_split_fuse, got {len(prompt)}")
        self._handles[request.request_id] = self._add(
            request.request_id, prompt, self._generation(request.output_tokens)
        )
        index = None
        if settings.max_ngram_size is not None:
            index = NgramIndex(prompt, ngram_max=settings.max_ngram_size, max_draft_tokens=settings.draft_tokens)
        self._accounts.append(Account(request.request_id, prompt, request.output_tokens, index))

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or being served."""
        return bool(self._accounts)

    def step(self) -> Step:
        """Run one iteration; to be called only while `busy`."""
        plan = plan_step(self._accounts, self._settings)
        decodes, chunks = plan
        operation: Operation = "prefill" if not decodes else "mixed" if chunks else "decode"
        context = sum(decode.account.cached for decode in decodes)
        prefilled = sum(chunk.account.computed for chunk in chunks)
        cpu_s, wall_s = self._run()
        received = self._read()
        self._check(plan, received)
        self._keep(plan, received)
        speculating = self._settings.mode != "plain"
        return Step(
            operation=operation,
            received=received,
            sequences=len(decodes),
            new_tokens=sum(decode.new_tokens for decode in decodes),
            context_tokens=context,
            prefill_sequences=len(chunks),
            prefill_tokens=sum(chunk.tokens for chunk in chunks),
            prefill_context_tokens=prefilled,
            drafted_tokens={d.account.request_id: d.drafted for d in decodes} if speculating else {},
            accepted_tokens={d.account.request_id: len(received[d.account.request_id]) - 1 for d in decodes},
            cpu_s=cpu_s,
            wall_s=wall_s,
        )

    def close(self) -> None:
        """Free what it holds."""
        self._handles.clear()
        self._accounts.clear()
        with contextlib.suppress(CalibrationError):
            while self._pipeline is not None and self._pipeline.has_non_finished_requests():
                self._run()  # the engine drops requests without a handle, and complains where none did
        self._pipeline = None

    # --- the pipeline

    def _generation(self, output_tokens: int) -> Any:
        """Give the configuration of a greedy request that an end token does not end."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = output_tokens, True, False
        if self._settings.num_assistant_tokens is not None:
            config.num_assistant_tokens = self._settings.num_assistant_tokens
        if self._settings.max_ngram_size is not None:
            config.max_ngram_size = self._settings.max_ngram_size
        return config

    def _add(self, number: int, prompt: Sequence[int], config: Any) -> Any:
        """Add a request; the engine drops it when the handle that comes back is."""
        return self._pipeline.add_request(number, self._tensor(np.array([prompt], dtype=np.int64)), config)

    def _run(self) -> tuple[float, float]:
        """Let the pipeline take a step; give its seconds of CPU and of the wall, nothing of ours among them."""
        wall_s, cpu_s = perf_counter(), process_time()
        try:
            self._pipeline.step()
        except RuntimeError as fault:
            raise CalibrationError(f"openvino: a step failed, {_last_line(fault)}") from None
        return process_time() - cpu_s, perf_counter() - wall_s

    def _read(self) -> dict[int, list[int]]:
        received: dict[int, list[int]] = {}
        for number, handle in self._handles.items():
            while handle.can_read():
                for output in handle.read().values():
                    if output.generated_ids:
                        received.setdefault(number, []).extend(output.generated_ids)
        return received

    def _check(self, plan: Plan, received: Mapping[int, Sequence[int]]) -> None:
        """Refuse a step that was not the one planned, as far as it shows."""
        scheduled = self._pipeline.get_metrics().scheduled_requests
        planned = len(plan.decodes) + len(plan.chunks)
        if scheduled != planned:
            raise _surprise(f"serve {planned} requests", f"{scheduled}")
        gaining = {decode.account.request_id for decode in plan.decodes}
        gaining |= {chunk.account.request_id for chunk in plan.chunks if chunk.last}
        if gaining != set(received):
            raise _surprise(f"give tokens to requests {sorted(gaining)}", f"{sorted(received)}")
        for chunk in plan.chunks:
            number = chunk.account.request_id
            if chunk.last and len(received[number]) != 1:
                raise _surprise(f"give request {number} its first token alone", f"{len(received[number])}")
        for decode in plan.decodes:
            _check_draft(decode, received[decode.account.request_id])

    def _keep(self, plan: Plan, received: Mapping[int, Sequence[int]]) -> None:
        """Keep account of the step."""
        for chunk in plan.chunks:
            chunk.account.computed += chunk.tokens
        for account in self._accounts:
            account.take(received.get(account.request_id, ()))
        for account in [account for account in self._accounts if account.left <= 0]:
            del self._handles[account.request_id]
            self._accounts.remove(account)


def _check_draft(decode: Decode, tokens: Sequence[int]) -> None:
    """Refuse tokens that the draft and the rule of acceptance do not explain."""
    number, accepted = decode.account.request_id, len(tokens) - 1
    if accepted > decode.drafted:
        raise _surprise(f"give request {number} at most {decode.drafted + 1} tokens", f"{len(tokens)}")
    if decode.proposal is None:
        return
    agreed = 0
    while agreed < min(decode.drafted, len(tokens)) and decode.proposal[agreed] == tokens[agreed]:
        agreed += 1
    if agreed != accepted:
        raise _surprise(f"accept {agreed} of {list(decode.proposal)} for request {number}", f"{accepted}")


def _surprise(rule: str, got: str) -> CalibrationError:
    return CalibrationError(
        f"openvino: by its scheduling rules the step must {rule}, got {got}; this version of the engine differs from "
        "the one that was studied"
    )


def write_ir(gguf: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Convert a GGUF file to an IR `folder`, as a draft model must be one; an older one there is replaced."""
    genai, source = _require("openvino_genai"), Path(gguf)
    if not source.is_file():
        raise CalibrationError(f"{source}: must be a GGUF file, it is not there")
    target = Path(folder)
    with fresh_folder(target, "openvino_model.xml", error=CalibrationError, what="IR folder") as scratch:
        copy = scratch / source.name
        shutil.copyfile(source, copy)
        try:
            genai.LLMPipeline(str(copy), "CPU", enable_save_ov_model=True)
        except RuntimeError as fault:
            raise CalibrationError(f"{source}: OpenVINO GenAI cannot convert it, {_last_line(fault)}") from None
        copy.unlink()
    return target


def _last_line(fault: Exception) -> str:
    """Give the line of an error of the engine that says what is wrong; those before it name its source files."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return lines[-1] if lines else type(fault).__name__


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as fault:
        if fault.name and fault.name.split(".")[0] != module:
            raise
        raise MissingExtraError(module, "engines") from None
