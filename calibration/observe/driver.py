"""Drives a server through one repeat of a workload in real time: arrivals are slept for, answers are listened to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from calibration.common.errors import CalibrationError
from calibration.observe.answer import Answer, AnswerReader
from calibration.observe.client import Client, RefusedError
from calibration.observe.prompts import Prompt
from calibration.observe.server import Server
from calibration.observe.source import R, R_co, Source

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
