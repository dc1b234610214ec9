"""Observe a server under a workload, in real time, and give the measured run."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Literal

from calibration.common.errors import CalibrationError
from calibration.common.progress import Progress
from calibration.common.secrets import Secret
from calibration.common.version import paceline_version
from calibration.measured import EngineInfo, Manifest, MeasuredRun
from calibration.measured.run import Setting
from calibration.observe.client import Client
from calibration.observe.prometheus import SPECULATION, bare, counter_name, difference, parse_counters
from calibration.observe.prompts import Prompt
from calibration.observe.record import Driver, Served, notes, request_columns, unknown
from calibration.observe.server import Endpoint, R, Request, Server, Source, discover
from calibration.traces.manifest import DeviceInfo

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
