"""Which server is there: its engine, its models, and which fields of a request it understands.

What an observed run asks of a workload: its protocol, stated by its shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.measured.run import EngineInfo, Setting
from calibration.observe.answer import AnswerReader
from calibration.observe.client import Client, RefusedError
from calibration.observe.prompts import Prompt


class Request(Protocol):
    """One request of a workload; `sequence` is the index of its prompt, `counted` is false for a filler."""

    id: int
    sequence: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    counted: bool


R = TypeVar("R", bound=Request)
R_co = TypeVar("R_co", bound=Request, covariant=True)


class Source(Protocol[R]):
    """Where the requests of one repeat come from, which ends when it is `done`; times are seconds from its start.

    An open loop knows every arrival beforehand; in a closed one the next request arrives when one has ended.
    """

    counted: int

    @property
    def done(self) -> bool:
        """Whether every counted request has ended."""
        ...

    @property
    def next_arrival_s(self) -> float:
        """When the next request arrives, if nothing else happens before; infinite where none will."""
        ...

    def admit(self, now: float, slots: int) -> Sequence[R]:
        """Take at most `slots` requests that have arrived, oldest first."""
        ...

    def end(self, request: R, now: float) -> None:
        """Hear that `request` has ended."""
        ...


Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

_USAGE = {"stream_options": {"include_usage": True}}
_RUNNING_USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
_FIELDS: tuple[dict[str, Any], ...] = (
    {**_RUNNING_USAGE, "ignore_eos": True, "return_token_ids": True},
    {**_RUNNING_USAGE, "ignore_eos": True},
    {**_USAGE, "ignore_eos": True},
    _USAGE,
    {},
)
"""Fields beyond OpenAI's core, from the most telling down to none; the first that the server takes are sent."""
_NOT_UNDERSTOOD = (400, 422)
_PROBE_TOKENS = 2
_PROBE_PROMPT_TOKENS = 4


@dataclass(frozen=True)
class Server:
    """A server that is ready to be driven.

    `fields`: sent with every request beyond ``model``, ``prompt``, ``max_tokens``, ``temperature`` and ``stream``.
    `by_ids`: whether prompts go as token ids.
    """

    model: str
    engine: EngineInfo
    endpoint: Endpoint
    by_ids: bool
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where requests go."""
        return PATHS[self.endpoint]

    def body(self, prompt: Prompt, prompt_tokens: int, output_tokens: int, cache_salt: str) -> dict[str, Any]:
        """Give one request: greedy, streamed, `output_tokens` long.

        `cache_salt` keeps vLLM's prefix cache of one repeat apart from that of others; other servers do not get it.
        """
        own: dict[str, Any] = {}
        if self.engine.name == "vllm":
            own = {"cache_salt": cache_salt}
        elif self.engine.name == "transformers":  # which knows no ignore_eos
            own = {"generation_config": json.dumps({"min_new_tokens": output_tokens, "do_sample": False})}
        told = _asked(self.endpoint, self.by_ids, prompt, prompt_tokens)
        fixed = {"max_tokens": output_tokens, "temperature": 0, "stream": True}
        return {"model": self.model, **told, **fixed, **self.fields, **own}


async def discover(client: Client, prompt: Prompt, endpoint: Endpoint, model: str | None = None) -> Server:
    """Find out what serves at `client` and send it a few tokens of `prompt`, to learn which fields it understands.

    `CalibrationError` where `model` is not served, where several are and none is named, or where the server takes no
    form of the prompt.
    """
    models, owner = await _models(client, required=model is None)
    engine = await _engine(client, owner)
    model = _chosen(client.url, model, models, strict=engine.name != "transformers")
    fault: RefusedError | None = None
    for server in _forms(model, engine, endpoint, prompt):
        try:
            await _probe(client, server, prompt)
        except RefusedError as refused:
            if refused.status not in _NOT_UNDERSTOOD:
                raise
            fault = refused
        else:
            return server
    if fault is not None:
        raise fault
    raise CalibrationError(
        f"{client.url}: a chat must have its prompts as text, prompt of {prompt.sequence_id} has token ids alone"
    )


def _chosen(url: str, model: str | None, models: Sequence[str], *, strict: bool) -> str:
    """Give the model to ask for. Not `strict`: transformers lists what it could load, not what it serves."""
    if model is None:
        if len(models) != 1:
            listed = ", ".join(models) or "none"
            raise CalibrationError(f"{url}: model must be given unless the server lists just one, it lists {listed}")
        return models[0]
    if strict and models and model not in models:
        raise CalibrationError(
            f"{url}: model must be one that the server has, got '{model}'{did_you_mean(model, models)}"
        )
    return model


def _forms(model: str, engine: EngineInfo, endpoint: Endpoint, prompt: Prompt) -> Iterator[Server]:
    """Give the forms of a request to try, the most telling first."""
    own = {"return_spec_tokens_details": True} if engine.name == "sglang" else {}
    for by_ids in (True, False):
        given = prompt.token_ids and endpoint == "completions" if by_ids else prompt.text
        if not given:
            continue
        for fields in _FIELDS:
            yield Server(model, engine, endpoint, by_ids, {**fields, **own} if fields else {})


async def _probe(client: Client, server: Server, prompt: Prompt) -> None:
    """Ask for a few tokens; the prompt is short enough to leave no whole block in a prefix cache."""
    short = prompt if server.by_ids else Prompt(prompt.sequence_id, prompt.domain, text="Hello")
    reader = AnswerReader()
    body = server.body(short, _PROBE_PROMPT_TOKENS, _PROBE_TOKENS, "paceline-probe")
    await client.stream(server.path, body, lambda event: reader.take(event, 0.0))


async def _models(client: Client, *, required: bool) -> tuple[list[str], str]:
    """Give the names of the models that the server lists, and who it says owns them; none where it lists none."""
    listed = await client.get_object("/v1/models", required=required) or {}
    data = listed.get("data")
    if required and not isinstance(data, list):
        raise CalibrationError(f"{client.url}/v1/models: must list the models of an OpenAI-compatible server")
    rows = [row for row in data or [] if isinstance(row, dict) and isinstance(row.get("id"), str)]
    owners = {str(row.get("owned_by", "")) for row in rows}
    return [row["id"] for row in rows], owners.pop() if len(owners) == 1 else ""


async def _engine(client: Client, owner: str) -> EngineInfo:
    """Give the engine's name and version, ``unknown`` and None where it does not say."""
    if owner == "sglang":
        told = await client.get_object("/server_info") or await client.get_object("/get_server_info") or {}
        return EngineInfo(name="sglang", version=_version(told.get("version")), settings=_sglang(told))
    if owner == "llamacpp":
        told = await client.get_object("/props") or {}
        return EngineInfo(name="llama.cpp", version=_version(told.get("build_info")))
    if owner == "vllm":
        told = await client.get_object("/version") or {}
        return EngineInfo(name="vllm", version=_version(told.get("version")))
    served = await client.get_object("/openapi.json") or {}
    return EngineInfo(name="transformers" if "/load_model" in served.get("paths", {}) else "unknown")


def _version(told: Any) -> str | None:
    return told if isinstance(told, str) and told else None


def _sglang(told: Mapping[str, Any]) -> dict[str, Setting]:
    """Give the settings of speculation and batching that SGLang reports."""
    wanted = ("speculative_", "max_running_requests", "chunked_prefill_size", "schedule_policy")
    return {
        key: value
        for key, value in told.items()
        if key.startswith(wanted) and isinstance(value, str | int | float | bool)
    }


def _asked(endpoint: Endpoint, by_ids: bool, prompt: Prompt, tokens: int) -> dict[str, Any]:
    if by_ids:
        return {"prompt": prompt.of_length(tokens)}
    if prompt.text is None:
        raise CalibrationError(f"prompt of {prompt.sequence_id}: must have text, this server takes no token ids")
    if endpoint == "chat":
        return {"messages": [{"role": "user", "content": prompt.text}]}
    return {"prompt": prompt.text}
