"""HTTP with one server: every fault becomes one `CalibrationError` that begins with the address.

Server-sent events, as OpenAI-compatible servers stream them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from pydantic import SecretStr

from calibration.common.errors import CalibrationError, MissingExtraError
from calibration.common.secrets import Secret, concealed
from calibration.observe.answer import said

if TYPE_CHECKING:
    import httpx

DONE = "[DONE]"
_KNOWN = ("event", "id", "retry")


class EventReader:
    """Takes the bytes of a stream as they come and gives the objects that the events in them hold.

    `done` is true once the server has said ``[DONE]``; not every server does.
    """

    def __init__(self) -> None:
        self.done = False
        self._rest = b""
        self._data: list[str] = []

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Give the object of every event that `data` completes; `CalibrationError` where one is none."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            text = _decode(line)
            if text:
                self._take(text)
            elif self._data:
                event = self._event()
                if event is not None:
                    yield event

    @property
    def cut(self) -> bool:
        """Whether the stream stopped in the middle of an event."""
        return bool(self._rest.strip() or self._data)

    def _take(self, line: str) -> None:
        name, colon, value = line.partition(":")
        if name == "data" and colon:
            self._data.append(value.removeprefix(" "))
        elif name not in ("", *_KNOWN):  # a line that begins with a colon is a comment
            raise CalibrationError(f"stream: must be server-sent events, got the line {line[:120]!r}")

    def _event(self) -> dict[str, Any] | None:
        text = "\n".join(self._data)
        self._data = []
        if text.strip() == DONE:
            self.done = True
            return None
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise CalibrationError(f"stream: every event must be a JSON object, got {text[:120]!r}")
        return found


def _decode(line: bytes) -> str:
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise CalibrationError(f"stream: must be UTF-8, got {line[:60]!r}") from None


CONNECT_S = 10.0
"""Longest wait for a connection."""
_KEEP_IDLE_S = 2.0
"""How long an idle connection is used again: less than servers keep one (uvicorn 5 s), who may close it meanwhile."""


class RefusedError(CalibrationError):
    """The server answered a request with an HTTP error; `status` is its code."""

    def __init__(self, url: str, status: int, body: bytes, known: Sequence[Secret] = ()) -> None:
        told = concealed(said(_object(body)), known)
        super().__init__(f"{url}: the server must answer with HTTP 200, got {status}: {told}")
        self.status = status


class Client:
    """One server at `url` (with or without ``/v1`` at its end); use as an asynchronous context manager.

    `timeout_s`: longest wait for the next byte of an answer. Proxies are taken from the environment, as httpx does.
    The key, and the user and password of an address, are in no message and not in `url`.
    """

    def __init__(self, url: str, *, api_key: Secret | None = None, timeout_s: float = 300.0) -> None:
        library = _httpx()
        self.url, user = _address(url)
        self._known = [SecretStr(part) for part in user or ()]
        self._timeout_s = timeout_s
        headers = {"Accept-Encoding": "identity"}  # compression would hold events back
        if api_key:
            self._known.append(api_key if isinstance(api_key, SecretStr) else SecretStr(api_key))
            headers["Authorization"] = f"Bearer {_printable(self._known[-1])}"
        limits = library.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_IDLE_S)
        timeout = library.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s), pool=None)
        with self._explained(self.url):
            self._http: httpx.AsyncClient = library.AsyncClient(
                headers=headers, auth=user, limits=limits, timeout=timeout
            )

    async def __aenter__(self) -> Client:
        """Open it."""
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *fault: object) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def get(self, path: str, *, required: bool = False) -> bytes | None:
        """Give what the server has at `path`; None where it has nothing there, unless it is `required`."""
        url = self.url + path
        with self._explained(url):
            try:
                response = await self._http.get(url)
            except (_httpx().ReadError, _httpx().RemoteProtocolError):  # a kept connection that the server closed
                response = await self._http.get(url)
        if response.status_code in (401, 403) or (required and response.status_code != 200):
            raise RefusedError(url, response.status_code, response.content, self._known)
        return response.content if response.status_code == 200 else None

    async def get_object(self, path: str, *, required: bool = False) -> dict[str, Any] | None:
        """Give the JSON object that the server has at `path`, None where it has none there."""
        body = await self.get(path, required=required)
        found = None if body is None else _object(body)
        return found if isinstance(found, dict) else None

    async def stream(self, path: str, body: Mapping[str, Any], hear: Callable[[dict[str, Any]], None]) -> None:
        """Post `body` and let `hear` have every event of the streamed answer as soon as its bytes are there."""
        url, events = self.url + path, EventReader()
        with self._explained(url):
            async with self._http.stream("POST", url, json=body) as response:
                if response.status_code != 200:
                    raise RefusedError(url, response.status_code, await response.aread(), self._known)
                async for data in response.aiter_bytes():
                    for event in events.feed(data):
                        hear(event)
        if events.cut:
            raise CalibrationError(
                f"{url}: the stream must end with a whole event, it broke off in the middle of one"
            )

    @contextmanager
    def _explained(self, url: str) -> Iterator[None]:
        """Turn the faults of httpx into errors that say what to do."""
        library = _httpx()
        try:
            yield
        except RefusedError:
            raise
        except CalibrationError as fault:
            raise CalibrationError(concealed(f"{url}: {fault}", self._known)) from None
        except library.ConnectTimeout:
            raise CalibrationError(f"{url}: cannot connect within {CONNECT_S:g} s; is the server running?") from None
        except library.TimeoutException:
            raise CalibrationError(
                f"{url}: the next byte of an answer must come within {self._timeout_s:g} s, none came"
            ) from None
        except library.ConnectError as fault:
            raise CalibrationError(f"{url}: cannot connect, {fault}; is the server running?") from None
        except (library.InvalidURL, library.UnsupportedProtocol) as fault:
            raise CalibrationError(concealed(f"{url}: must be an address, {fault}", self._known)) from None
        except library.TransportError as fault:
            told = concealed(str(fault) or type(fault).__name__, self._known)
            raise CalibrationError(f"{url}: the connection broke, {told}") from None


def _address(url: str) -> tuple[str, tuple[str, str] | None]:
    """Give the address of the server without the user and password in it, and these two where they are in it."""
    address = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    scheme, found, rest = address.partition("://")
    if not found or scheme not in ("http", "https"):
        raise CalibrationError(f"url: must begin with http:// or https://, got {concealed(url.rpartition('@')[2])!r}")
    user, at, host = rest.rpartition("@")
    if "?" in host or "#" in host:
        raise CalibrationError("url: must have no query and no fragment; a key goes into --api-key-env, not into it")
    name, _, password = user.partition(":")
    return f"{scheme}://{host}", (unquote(name), unquote(password)) if at else None


def _printable(key: SecretStr) -> str:
    """Give the key, which must fit into a header; what does not is not told."""
    value = key.get_secret_value()
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise CalibrationError("api key: must be printable ASCII without spaces, got another character in it")
    return value


def _object(body: bytes) -> Any:
    """Give the JSON value in `body`, or its text where it is none."""
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def _httpx() -> Any:
    try:
        return importlib.import_module("httpx")
    except ModuleNotFoundError:
        raise MissingExtraError("httpx", "observe") from None
