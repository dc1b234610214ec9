"""Observe a server under a workload, in real time, and give the measured run.

From answers to the table of a measured run, and to what a reader of it must know.

Drives a server through one repeat of a workload in real time: arrivals are slept for, answers are listened to.
"""

from __future__ import annotations

import asyncio
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Generic, Literal

from calibration.common.errors import CalibrationError
from calibration.common.progress import Progress
from calibration.common.secrets import Secret
from calibration.common.version import paceline_version
from calibration.measured import EngineInfo, Manifest, MeasuredRun
from calibration.measured.run import Setting
from calibration.observe.answer import Answer, AnswerReader
from calibration.observe.client import Client, RefusedError
from calibration.observe.prometheus import SPECULATION, bare, counter_name, difference, parse_counters, total
from calibration.observe.prompts import Prompt
from calibration.observe.server import Endpoint, R, R_co, Request, Server, Source, discover
from calibration.traces.manifest import DeviceInfo

_ALL = 2**31
"""The server schedules: every request goes out when it arrives."""


@dataclass(frozen=True)
class Served(Generic[R_co]):
    """One request and what it received."""

    request: R_co
    prompt: Prompt
    answer: Answer


class Driver:
    """Sends the requests of a source to `server`."""

    def __init__(self, client: Client, server: Server, prompts: Sequence[Prompt]) -> None:
        self._client, self._server, self._prompts = client, server, prompts

    async def repeat(self, source: Source[R], salt: str, heard: Callable[[], None]) -> list[Served[R]]:
        """Run `source` until it is done, and give what ended in the order in which it did; times are from its start.

        `heard` is called for every counted request that has ended. Fillers that are still being answered at the end
        are dropped. Any fault of one request ends the whole.
        """
        loop = asyncio.get_running_loop()
        start = loop.time()
        flying: dict[asyncio.Task[Answer], R] = {}
        served: list[Served[R]] = []
        try:
            while not source.done:
                for request in source.admit(loop.time() - start, _ALL):
                    flying[asyncio.create_task(self._send(request, salt, start))] = request
                for task in await _ended(flying, source.next_arrival_s - (loop.time() - start)):
                    request = flying.pop(task)
                    answer = task.result()
                    source.end(request, loop.time() - start)
                    served.append(Served(request, self._prompt(request), answer))
                    if request.counted:
                        heard()
        finally:
            for task in flying:
                task.cancel()
            await asyncio.gather(*flying, return_exceptions=True)
        return served

    async def _send(self, request: R, salt: str, start: float) -> Answer:
        """Send one request and listen to its answer."""
        loop = asyncio.get_running_loop()
        body = self._server.body(self._prompt(request), request.prompt_tokens, request.output_tokens, salt)
        reader, sent = AnswerReader(), loop.time() - start

        def hear(event: dict[str, Any]) -> None:
            reader.take(event, loop.time() - start)

        try:
            await self._client.stream(self._server.path, body, hear)
            if not reader.finished:
                raise CalibrationError(
                    f"{self._client.url}{self._server.path}: the stream must end with a finish_reason, it broke off"
                )
        except RefusedError:
            raise
        except CalibrationError as fault:
            had = f"{reader.tokens} of {request.output_tokens} tokens"
            raise CalibrationError(f"{fault}; request {request.id} had {had}") from None
        try:
            return replace(reader.answer(), sent_s=sent)
        except CalibrationError as fault:
            raise CalibrationError(f"{self._client.url}: request {request.id}: {fault}") from None

    def _prompt(self, request: R) -> Prompt:
        return self._prompts[request.sequence]


async def _ended(flying: dict[asyncio.Task[Answer], R], wait_s: float) -> Sequence[asyncio.Task[Answer]]:
    """Wait for an answer to end, or for the next arrival; give the answers that ended, oldest request first."""
    timeout = None if math.isinf(wait_s) else max(wait_s, 0.0)
    if not flying:
        if timeout is None:
            raise CalibrationError(
                "workload: must go on until every counted request has ended, nothing arrives any more"
            )
        await asyncio.sleep(timeout)
        return []
    done, _ = await asyncio.wait(flying, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    return [task for task in flying if task in done]


Repeats = Sequence[Sequence[Served[Request]]]


def request_columns(repeats: Repeats) -> dict[str, list[Any]]:
    """Give the columns of the table of requests, ordered by repeat and request."""
    rows = [
        _row(repeat, one)
        for repeat, served in enumerate(repeats)
        for one in sorted(served, key=lambda one: one.request.id)
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _row(repeat: int, one: Served[Request]) -> dict[str, Any]:
    request, answer, speculation = one.request, one.answer, one.answer.speculation
    return {
        "repeat": repeat,
        "request_id": request.id,
        "sequence_id": one.prompt.sequence_id,
        "domain": one.prompt.domain,
        "counted": request.counted,
        "arrival_s": request.arrival_s,
        "first_token_s": answer.emission_s[0],
        "finish_s": answer.emission_s[-1],
        "prompt_tokens": answer.prompt_tokens or request.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "drafts": None if speculation is None else speculation.drafts,
        "drafted_tokens": None if speculation is None else speculation.drafted_tokens,
        "accepted_tokens": None if speculation is None else speculation.accepted_tokens,
        "emission_s": list(answer.emission_s),
        "emitted": None if answer.emitted is None else list(answer.emitted),
        "output_token_ids": None if answer.token_ids is None else list(answer.token_ids),
    }


def unknown(server: Server, repeats: Repeats, counters: Mapping[str, float] | None, device: bool) -> list[str]:
    """Say what could not be seen from outside."""
    answers = [one.answer for served in repeats for one in served]
    lacking: list[tuple[bool, str]] = [
        (True, "steps: a server shows what requests receive, not its iterations"),
        (not device, "device: not given"),
        (server.engine.name == "unknown", "engine: the server does not say what it is"),
        (server.engine.version is None, "engine version: the server does not say"),
        (counters is None, "counters: the server has no /metrics"),
        (any(answer.speculation is None for answer in answers), "drafts: not reported per request"),
        (
            any(answer.emitted is None for answer in answers),
            "emitted: arrivals are not single tokens, how many each holds is not reported; one is taken for one step",
        ),
        (
            any(not answer.counted for answer in answers),
            "output_tokens: not counted by the server; one arrival is taken for one token",
        ),
        (any(answer.token_ids is None for answer in answers), "output_token_ids: not reported"),
        (
            any(answer.prompt_tokens is None for answer in answers),
            "prompt_tokens: not counted by the server; those of the workload are given",
        ),
    ]
    return [text for lacks, text in lacking if lacks]


def notes(server: Server, repeats: Repeats, counters: Mapping[str, float] | None) -> list[str]:
    """Say what was done, and what differs from what the workload asked for."""
    every = [one for served in repeats for one in served]
    late = max(one.answer.sent_s - one.request.arrival_s for one in every)
    form = "token ids" if server.by_ids else "text"
    fields = ", ".join(server.fields) or "none"
    found = [
        f"prompts were sent as {form}; fields beyond OpenAI's core that the server takes: {fields}",
        "a request of two tokens before the first repeat found out which; it also warmed the server up",
        f"requests went out at most {1e3 * late:.1f} ms after their arrival",
    ]
    found += _differing(
        every,
        ("got fewer tokens than asked for", lambda one: one.answer.output_tokens < one.request.output_tokens),
        ("got more tokens than asked for", lambda one: one.answer.output_tokens > one.request.output_tokens),
        ("had a prompt that was cut or repeated to the workload's length", lambda one: _refitted(server, one)),
        (
            "had a prompt that the server counted otherwise than the workload; its count is given",
            lambda one: one.answer.prompt_tokens not in (None, one.request.prompt_tokens),
        ),
        ("had prompt tokens in the server's prefix cache", lambda one: bool(one.answer.cached_tokens)),
    )
    return found + _against_counters(every, counters or {})


def _differing(
    every: Sequence[Served[Request]], *kinds: tuple[str, Callable[[Served[Request]], bool]]
) -> Iterable[str]:
    for text, differs in kinds:
        number = sum(map(differs, every))
        if number:
            yield f"{number} of {len(every)} requests {text}"


def _refitted(server: Server, one: Served[Request]) -> bool:
    return server.by_ids and len(one.prompt.token_ids or ()) != one.request.prompt_tokens


def _against_counters(every: Sequence[Served[Request]], counters: Mapping[str, float]) -> list[str]:
    """Compare what requests received with what the server counted: others may use it too, fillers may be dropped."""
    drafted = [one.answer.speculation.drafted_tokens for one in every if one.answer.speculation is not None]
    received = {"generation_tokens_total": sum(one.answer.output_tokens for one in every)}
    if len(drafted) == len(every):
        received[SPECULATION[1]] = sum(drafted)
    found = []
    for name, tokens in received.items():
        keys = {counter_name(key) for key in counters if bare(key) == name}
        counted = total(counters, keys.pop()) if len(keys) == 1 else None
        if counted is not None and counted != tokens:
            found.append(f"the server counted {counted:.0f} {name}, the requests recorded here add up to {tokens}")
    return found


_SETTLE_S = 0.1
_SETTLE_READINGS = 20


@dataclass(frozen=True)
class Observation:
    """What a measured run says of itself that the server cannot say: the scenario that was run, and on what.

    `scenario`: its resolved text (TOML), which predicts the run; `settings`: of the engine, as it was started.
    """

    name: str
    role: Literal["fit", "held-out"]
    scenario: str
    scenario_hash: str
    command: str
    device: DeviceInfo | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)


def observe(
    url: str,
    source_factory: Callable[[], Source[R]],
    prompts: Sequence[Prompt],
    about: Observation,
    *,
    model: str | None = None,
    api_key: Secret | None = None,
    endpoint: Endpoint = "completions",
    timeout_s: float = 300.0,
    repeats: int = 1,
    progress: Progress | None = None,
) -> MeasuredRun:
    """Drive the OpenAI-compatible server at `url` with the workload of `source_factory`, and give the measured run.

    Decoding is greedy and runs to the tokens that the workload asks for, where the server can ignore the end token.
    Time is wall time from the start of each repeat. Every repeat has a source of its own and, with vLLM, a prefix
    cache of its own. `prompts`: indexed by a request's `sequence`. `model` may be left out where one is served.
    `timeout_s`: longest wait for the next byte of an answer. `progress` hears (counted requests ended, in all).

    Raises `CalibrationError` with the address where the server cannot be reached, refuses, breaks off, falls silent
    or does not have `model`, and `MissingExtraError` without the extra ``observe``. Nothing is written.
    """
    if repeats < 1:
        raise CalibrationError(f"repeats: must be at least 1, got {repeats}")
    if not prompts:
        raise CalibrationError("prompts: must hold at least one prompt, got none")

    async def run() -> MeasuredRun:
        async with Client(url, api_key=api_key, timeout_s=timeout_s) as client:
            server = await discover(client, prompts[0], endpoint, model)
            created = datetime.now(UTC)
            salts = [f"paceline-{created.isoformat()}-{repeat}" for repeat in range(repeats)]
            driver = Driver(client, server, prompts)
            served, counters = await _repeats(client, driver, source_factory, salts, progress)
            return _measured(server, served, counters, about, created)

    return asyncio.run(run())


async def _repeats(
    client: Client,
    driver: Driver,
    source_factory: Callable[[], Source[R]],
    salts: Sequence[str],
    progress: Progress | None,
) -> tuple[list[list[Served[R]]], dict[str, float] | None]:
    """Run one repeat per salt; give what each served, and how far the server's counters went in all of them."""
    served: list[list[Served[R]]] = []
    went: dict[str, float] = {}
    before = await _settled(client)
    for repeat, salt in enumerate(salts):
        source = source_factory()
        tally = _Tally(progress, repeat * source.counted, len(salts) * source.counted)
        served.append(await driver.repeat(source, salt, tally.add))
        after = await _settled(client)
        for key, value in difference(before or {}, after or {}).items():
            went[key] = went.get(key, 0.0) + value
        before = after
    return served, None if before is None else went


class _Tally:
    """Adds up counted requests that have ended, over the repeats."""

    def __init__(self, progress: Progress | None, done: int, total: int) -> None:
        self._progress, self._done, self._total = progress, done, total

    def add(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


async def _counters(client: Client) -> dict[str, float] | None:
    """Read the engine's own counters, without those of its web server and its interpreter; None without /metrics."""
    body = await client.get("/metrics")
    if body is None:
        return None
    try:
        found = parse_counters(body.decode())
    except (CalibrationError, UnicodeDecodeError) as fault:
        raise CalibrationError(f"{client.url}/metrics: {fault}") from None
    return {key: value for key, value in found.items() if ":" in counter_name(key)}


async def _settled(client: Client) -> dict[str, float] | None:
    """Read the counters until two readings agree: engines count a little after they answer."""
    last = await _counters(client)
    for _ in range(_SETTLE_READINGS if last is not None else 0):
        await asyncio.sleep(_SETTLE_S)
        again = await _counters(client)
        if again == last:
            break
        last = again
    return last


def _measured(
    server: Server,
    served: Sequence[Sequence[Served[Request]]],
    counters: Mapping[str, float] | None,
    about: Observation,
    created: datetime,
) -> MeasuredRun:
    settings = {**server.engine.settings, "endpoint": server.endpoint, **about.settings}
    manifest = Manifest(
        paceline_version=paceline_version(),
        name=about.name,
        role=about.role,
        engine=EngineInfo(name=server.engine.name, version=server.engine.version, settings=settings),
        model=server.model.rstrip("/").split("/")[-1] if server.model.startswith("/") else server.model,
        device=about.device or DeviceInfo(name="unknown", kind="unknown"),
        clock="wall",
        repeats=len(served),
        created=created.isoformat(timespec="seconds"),
        command=about.command,
        software={"python": platform.python_version(), "httpx": metadata.version("httpx")},
        scenario_hash=about.scenario_hash,
        unknown=tuple(unknown(server, served, counters, about.device is not None)),
        notes=tuple(notes(server, served, counters)),
        counters={key: value for key, value in sorted((counters or {}).items()) if value or bare(key) in SPECULATION},
    )
    return MeasuredRun.build(manifest, request_columns(served), None, about.scenario)
